"""What devices of a mesh hold and exchange, read from compiled programs that are never run."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import hlo
from tests.mesh import LAYOUTS, Layout

pytestmark = pytest.mark.cpu

PAGE = (Path(__file__).resolve().parent.parent / "docs/many_devices.md").read_text("utf-8")
SECTION = PAGE.split("\n## What the devices exchange\n")[1].split("\n## ")[0]
FLOAT = 4


def lower(layout, rows, width, classes, reduction="mean", dtype=jnp.float32, **options):
    """Value and gradients of hidden states and kernel, before any compiler has seen them."""
    mesh = layout.mesh()
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, mesh, **layout.spread)

    def total(hidden, kernel, labels, cotangent):
        found = loss(hidden, kernel, labels, reduction=reduction, **options)
        return jnp.vdot(cotangent, found) if reduction == "none" else found

    def argument(name, dtype, *shape):
        spec = layout.spec(name)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        argument("hidden", dtype, rows, width),
        argument("kernel", dtype, width, classes),
        argument("labels", jnp.int32, rows),
        argument("labels", jnp.float32, rows),
    )
    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments)


def linear(*arguments, **options):
    return lower(*arguments, **options).compile()


def dense(layout, rows, classes, reduction="mean", **options):
    """The program of value and gradient of the logits."""
    mesh = layout.mesh()
    loss = ce_jax.on_mesh(
        ce_jax.softmax_cross_entropy_with_integer_labels,
        mesh,
        rows=layout.rows,
        classes=layout.classes,
    )

    def total(logits, labels):
        return jnp.sum(loss(logits, labels, reduction=reduction, **options))

    specs = ((jnp.float32, (rows, classes), P(layout.rows, layout.classes)),)
    specs += ((jnp.int32, (rows,), P(layout.rows)),)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for dtype, shape, spec in specs
    ]
    return jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()


def test_dense_losses_exchange_rows():
    """Under every option, value and gradient: never more than this device's rows at once."""
    rows, classes = 64, 512
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": -1, "reduction": "none"}
    program = dense(LAYOUTS["data-tensor"], rows, classes, **options)
    found = hlo.collectives(program)
    assert {c.kind for c in found} == {"all-reduce"}
    assert max(c.largest for c in found) == rows // 2


@pytest.mark.parametrize(
    ("layout", "reduction"),
    [("data", "none"), ("data-tensor", "mean"), ("data-fsdp-tensor", "none")],
)
def test_linear_form_exchanges_gradients_once(layout, reduction):
    """Nothing inside a loop; nothing is gathered but the kernel that is spread by its width."""
    rows, width, classes = 64, 16, 512
    layout = LAYOUTS[layout]
    program = linear(layout, rows, width, classes, reduction, memory_budget=2**11)
    found = hlo.collectives(program)
    assert hlo.has_loop(program)
    assert not any(c.in_loop for c in found)
    kernel = width * classes // layout.axes.get("model", 1)
    others = [c[:3] for c in found if c.kind != "all-reduce"]
    of_kernel = [(kind, FLOAT * kernel, kernel) for kind in ("all-gather", "reduce-scatter")]
    assert others == (of_kernel if layout.width else [])
    assert max(c.largest for c in found) == kernel


def test_narrow_kernels_are_exchanged_as_they_are():
    """Nothing is widened before it is sent. (A CPU, which reduces no bfloat16, does so later.)"""
    lowered = lower(LAYOUTS["data-fsdp-tensor"], 64, 16, 512, dtype=jnp.bfloat16)
    pattern = r'"stablehlo\.(all_gather|reduce_scatter)".*?: \(tensor<([\w]*)>\)'
    found = re.findall(pattern, lowered.as_text(), re.DOTALL)
    assert sorted(found) == [("all_gather", "8x256xbf16"), ("reduce_scatter", "16x256xbf16")]


def test_a_collective_inside_a_loop_is_seen():
    """So that the test above can fail."""
    layout = LAYOUTS["data"]

    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: x - jax.lax.psum(x, "data"), x)

    local = jax.shard_map(
        looped, mesh=layout.mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    (found,) = hlo.collectives(jax.jit(local).lower(jnp.ones(8)).compile())
    assert found == hlo.Collective("all-reduce", FLOAT, 1, in_loop=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_temporaries_of_each_device(reduction):
    """Besides gradients that are yet to be added up, 10.5 MB; the local logits are 67 MB."""
    rows, width, classes = 4096, 256, 32768
    program = linear(LAYOUTS["data-tensor"], rows, width, classes, reduction)
    assert program.memory_analysis().temp_size_in_bytes <= 12 * 10**6


# What the table of costs calls them.
ROWS = Layout({"data": 8}, rows="data")
NAMED = {
    "`rows`": ROWS,
    "`rows`, `width=rows`": ROWS._replace(width="data"),
    "`classes`": LAYOUTS["tensor"],
    "`rows`, `classes`": LAYOUTS["data-tensor"],
    "`rows`, `classes`, `width=rows`": LAYOUTS["fsdp-tensor"],
    "`rows`, `classes`, `width` in `rows`": LAYOUTS["data-fsdp-tensor"],
}
DEVICES = {"r": "rows", "c": "classes", "w": "width"}
COSTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\| (?:dense|linear) \|.*$", SECTION, re.MULTILINE)
]


def test_every_parallelism_has_its_costs():
    assert [row[1] for row in COSTS if row[0] == "linear"] == list(NAMED)


def size(mesh_axes, layout):
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return math.prod(layout.axes[name] for name in names)


@pytest.mark.parametrize("sizes", [(64, 16, 512), (128, 8, 1024)], ids=str)
@pytest.mark.parametrize("row", COSTS, ids=lambda row: f"{row[0]} {row[1]}")
def test_costs_are_those_of_the_program(row, sizes):
    """The formulas of the table in `docs/many_devices.md`, to the byte."""
    form, spread, *formulas = row
    layout, (rows, width, classes) = NAMED[spread], sizes
    known = {"N": rows, "D": width, "V": classes, "s": FLOAT}
    known |= {key: size(getattr(layout, name), layout) for key, name in DEVICES.items()}
    program = dense(layout, rows, classes) if form == "dense" else linear(layout, *sizes)
    found = hlo.collectives(program)
    for kind, formula in zip(("all-reduce", "all-gather", "reduce-scatter"), formulas, strict=True):
        wanted = eval(formula.strip("`") or "0", {}, known)
        assert sum(c.bytes for c in found if c.kind == kind) == wanted, kind
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
