"""Meshes of eight devices for the tests: how each spreads a loss, and what is placed where."""

from typing import NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Layout(NamedTuple):
    """A mesh, and the arguments of `on_mesh`."""

    axes: dict
    rows: object = None
    classes: str | None = None
    width: object = None

    def mesh(self, axis_type=AxisType.Auto):
        names, sizes = tuple(self.axes), tuple(self.axes.values())
        return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))

    @property
    def spread(self):
        return {"rows": self.rows, "classes": self.classes, "width": self.width}

    @property
    def row_spec(self):
        return self.rows if isinstance(self.rows, P) else P(self.rows)

    def spec(self, name, class_axis=1):
        """Where an argument of a linear form is to lie, and so its gradient."""
        if name == "kernel":
            spec = (self.width, self.classes)
            return P(*(spec if class_axis == 1 else spec[::-1]))
        if name in ("bias", "weight"):
            return P(self.classes)
        return self.row_spec if name in ("hidden", "labels", "where", "sample_weight") else P()

    def place(self, mesh, name, x, class_axis=1):
        return jax.device_put(x, NamedSharding(mesh, self.spec(name, class_axis)))


LAYOUTS = {
    "data": Layout({"data": 8}, rows="data"),
    "fsdp": Layout({"data": 8}, rows="data", width="data"),
    "tensor": Layout({"model": 8}, classes="model"),
    "data-tensor": Layout({"data": 2, "model": 4}, rows="data", classes="model"),
    "fsdp-tensor": Layout({"data": 4, "model": 2}, rows="data", classes="model", width="data"),
    "data-fsdp-tensor": Layout(
        {"data": 2, "fsdp": 2, "model": 2}, rows=("data", "fsdp"), classes="model", width="fsdp"
    ),
    "data-sequence-tensor": Layout(
        {"data": 2, "seq": 2, "model": 2}, rows=P("data", "seq"), classes="model"
    ),
}
