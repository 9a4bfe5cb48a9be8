"""Sharding of the arguments of a loss on a mesh: a PartitionSpec for each name and shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from .._rows.sharded import reshard
from . import checks

Names = str | tuple[str, ...] | None
Shapes = dict[str, tuple[int, ...]]
Specs = dict[str, tuple[Names, ...]]

_OF_ROWS = ("labels", "where", "sample_weight", "temperature")
# Of the classes of each row that are known.
_KNOWN = ("teacher_ids", "teacher_log_probs")


class Plan(NamedTuple):
    """What is spread over which axes of the mesh.

    Attributes:
      mesh: a `Mesh` or an `AbstractMesh`.
      rows: mesh axes of each of the leading axes of the labels.
      classes: mesh axis of the classes.
      width: mesh axes of the kernel's axis that meets `hidden`, and of a teacher's kernel.
    """

    mesh: Any
    rows: tuple[Names, ...]
    classes: str | None
    width: tuple[str, ...]

    @property
    def row_axes(self) -> tuple[str, ...]:
        """All mesh axes over which rows are spread."""
        return tuple(name for entry in self.rows for name in names(entry))


def plan(mesh: Any, rows: Any, classes: str | None, width: Any) -> Plan:
    """The arguments of `on_mesh`, checked and in one form."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if mesh.empty:
        raise ValueError("mesh must be given, or set by jax.set_mesh; got neither")
    entries = tuple(rows) if isinstance(rows, PartitionSpec) else (rows,)
    found = Plan(mesh, tuple(map(_entry, entries)), classes, names(_entry(width)))
    if not isinstance(classes, str | None):
        raise TypeError(f"classes must be the name of one mesh axis or None, got {classes!r}")
    used = [*found.row_axes, *names(classes)]
    for name in (*used, *found.width):
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has the axes {mesh.axis_names}, but no {name!r}")
    if len(set(used)) != len(used) or len(set(found.width)) != len(found.width):
        raise ValueError(
            f"a mesh axis must not be named twice among rows and classes, got rows={rows!r}, "
            f"classes={classes!r}, width={width!r}"
        )
    if not set(found.width) <= set(found.row_axes):
        raise ValueError(
            f"width must name mesh axes that rows names as well, got width={width!r} and "
            f"rows={rows!r}"
        )
    return found


def _entry(x: Any) -> Names:
    if x is None or isinstance(x, str):
        return x
    if isinstance(x, tuple | list) and all(isinstance(name, str) for name in x):
        return tuple(x)
    raise TypeError(
        f"mesh axes must be named by a string, a tuple of strings, or None; got {x!r} "
        "(rows may be a PartitionSpec of these)"
    )


def names(entry: Names) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def of_logits(
    plan: Plan, shapes: Shapes, axis: int | Sequence[int] | None, *, soft: bool
) -> tuple[Specs, tuple[Names, ...]]:
    """Specs of the arguments of a loss of logits, and of the loss.

    Of several class axes the first one is spread, so that the flat ids of each device's classes
    follow upon each other. `soft` labels broadcast to the logits, others are those of the rows.
    """
    shape = shapes["logits"]
    axes = checks.axes(axis, len(shape))
    rest = [a for a in range(len(shape)) if a not in axes]
    rows = _rows(plan, len(rest))
    by_axis: dict[int, Names] = dict(zip(rest, rows, strict=True)) | {axes[0]: plan.classes}
    logits = tuple(by_axis.get(a) for a in range(len(shape)))
    row_shape = tuple(shape[a] for a in rest)
    by_class = {"logits", "teacher_logits"} | ({"labels"} if soft else set())
    if len(shapes.get("where", ())) == len(shape):
        by_class.add("where")

    def spec(name: str) -> tuple[Names, ...]:
        if name == "weight":
            return (plan.classes,)
        if name in by_class:
            return _broadcast(logits, shapes[name], shape)
        if name in _OF_ROWS:
            return _broadcast(rows, shapes[name], row_shape)
        return (*rows, None) if name in _KNOWN else ()

    return {name: spec(name) for name in shapes}, rows


def of_layer(
    plan: Plan, shapes: Shapes, class_axis: int, teacher_class_axis: int
) -> tuple[Specs, tuple[Names, ...]]:
    """Specs of the arguments of a linear form, and of its loss."""
    row_shape = shapes["hidden"][:-1]
    rows = _rows(plan, len(row_shape))
    kernel: tuple[Names, Names] = (plan.width or None, plan.classes)
    by_name: Specs = {
        **dict.fromkeys(("hidden", "teacher_hidden", *_KNOWN), (*rows, None)),
        "kernel": kernel if class_axis in (1, -1) else kernel[::-1],
        "teacher_kernel": kernel if teacher_class_axis in (1, -1) else kernel[::-1],
        "teacher_logits": (*rows, plan.classes),
        **dict.fromkeys(("bias", "teacher_bias", "weight"), (plan.classes,)),
    }

    def spec(name: str) -> tuple[Names, ...]:
        if name in _OF_ROWS:
            return _broadcast(rows, shapes[name], row_shape)
        return by_name.get(name, ())

    return {name: spec(name) for name in shapes}, rows


def _rows(plan: Plan, ndim: int) -> tuple[Names, ...]:
    if any(plan.rows[ndim:]):
        raise ValueError(
            f"rows must name mesh axes for at most the {ndim} axes of the loss, got {plan.rows}"
        )
    return (plan.rows + (None,) * ndim)[:ndim]


def _broadcast(
    spec: tuple[Names, ...], shape: tuple[int, ...], onto: tuple[int, ...]
) -> tuple[Names, ...]:
    """The spec of an array that is broadcast: an axis of size 1 is whole on every device."""
    start = len(onto) - len(shape)
    pairs = zip(spec[start:], shape, onto[start:], strict=True)
    return tuple(entry if have == want else None for entry, have, want in pairs)


def check_divisible(plan: Plan, shapes: Shapes, specs: Specs) -> None:
    """Raises where an axis of an argument does not divide evenly among the devices."""
    for name, spec in specs.items():
        for axis, entry in enumerate(spec):
            devices = math.prod(plan.mesh.shape[a] for a in names(entry))
            size = shapes[name][axis]
            if size % devices:
                raise ValueError(
                    f"{name} has {size} entries in axis {axis}, which is sharded over the "
                    f"{devices} devices of {entry!r}: write a multiple of {devices}. "
                    + _remedy(plan, name, entry)
                )


def _remedy(plan: Plan, name: str, entry: Names) -> str:
    if entry is not None and entry == plan.classes:
        return (
            "Pad the classes: a kernel with any numbers, and write num_classes=; logits with "
            "-inf, and labels and weight with 0"
        )
    if name in ("kernel", "teacher_kernel"):
        return "Use fewer devices for width, or pad hidden and kernel with 0"
    return "Pad the rows, and exclude the padding with where or ignore_index"


def placer(plan: Plan) -> Callable[[Array, tuple[Names, ...]], Array]:
    """A function that gives an array the sharding that `jax.shard_map` expects to find.

    JAX does this itself for mesh axes of type Auto, but not for axes of type Explicit.
    """
    types = zip(plan.mesh.axis_names, plan.mesh.axis_types, strict=True)
    explicit = {name for name, of_type in types if of_type == AxisType.Explicit}

    def place(x: Array, spec: tuple[Names, ...]) -> Array:
        if not explicit:
            return x
        visible = (tuple(n for n in names(entry) if n in explicit) or None for entry in spec)
        return reshard(x, NamedSharding(plan.mesh, PartitionSpec(*visible)))

    return place
