"""What cannot be spread over a mesh as asked is an error that says what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.helpers import WRONG_NAME

pytestmark = pytest.mark.cpu

LOSS = ce_jax.linear_softmax_cross_entropy
DENSE = ce_jax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("function", "spread", "error", "message"),
    [
        (ce_jax.nll_loss, {}, TypeError, "function must be one of .*linear_softmax_statistics"),
        (functools.partial(LOSS, reduction="mean"), {}, TypeError, "given when it is called"),
        (
            LOSS,
            {"rows": "batch"},
            ValueError,
            r"the mesh has the axes \('data', 'model'\).*'batch'",
        ),
        (LOSS, {"classes": "vocabulary"}, ValueError, "no 'vocabulary'"),
        (LOSS, {"rows": "data", "width": "fsdp"}, ValueError, "no 'fsdp'"),
        # Of what is of a wrong type, the suite's own type checks may speak first.
        (LOSS, {"rows": 3}, TypeError, "3"),
        (LOSS, {"rows": ("data", 0)}, TypeError, r"\('data', 0\)"),
        (LOSS, {"classes": ("data", "model")}, TypeError, r"\('data', 'model'\)"),
        (LOSS, {"rows": "data", "classes": "data"}, ValueError, "named twice.*rows='data'"),
        (LOSS, {"rows": P("data", "data")}, ValueError, "named twice"),
        (LOSS, {"width": "data"}, ValueError, "width must name mesh axes that rows names"),
        (LOSS, {"rows": "data", "width": "model"}, ValueError, "got width='model' and rows='data'"),
        (DENSE, {"rows": "data", "width": "data"}, ValueError, "width is for functions of"),
    ],
)
def test_what_is_spread(mesh, function, spread, error, message):
    with pytest.raises(error, match=message):
        ce_jax.on_mesh(function, mesh, **spread)


def test_the_mesh():
    with pytest.raises(TypeError, match="'data'"):
        ce_jax.on_mesh(LOSS, "data", rows="data")
    loss = ce_jax.on_mesh(LOSS, None, rows="data")
    with pytest.raises(ValueError, match=r"mesh must be given, or set by jax\.set_mesh"):
        loss(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32))


def arguments(rows=4, width=6, classes=8, **options):
    return {
        "hidden": np.ones((rows, width), np.float32),
        "kernel": np.ones((width, classes), np.float32),
        "labels": np.zeros(rows, np.int32),
        **options,
    }


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            arguments(rows=5),
            ValueError,
            "hidden has 5 entries in axis 0, .* 2 devices of 'data'.*Pad the rows, .*ignore_index",
        ),
        (
            arguments(classes=10),
            ValueError,
            "kernel has 10 entries in axis 1, .* 4 .* of 'model'.*Pad the classes: .*num_classes",
        ),
        (
            arguments(width=5),
            ValueError,
            r"kernel has 5 entries in axis 0, .* 2 devices of \('data',\).*pad hidden and kernel",
        ),
        (arguments(axis_name="model"), ValueError, "axis_name is for use inside jax.shard_map"),
        # Errors of the function itself tell the shapes of the whole arrays.
        (arguments(bias=np.ones(2, np.float32)), ValueError, r"bias must have shape \(8,\)"),
        (arguments(weight=np.ones(2)), ValueError, r"weight must have shape \(8,\)"),
        (arguments(sample_weight=np.ones(2)), ValueError, r"sample_weight must have .* of \(4,\)"),
        (arguments(labels=np.zeros(2, np.int32)), ValueError, r"labels must have shape \(4,\)"),
        (arguments(labels=np.zeros(4)), TypeError, "labels must have an integer dtype"),
        (arguments(num_classes=9), ValueError, r"num_classes must be in \[1, 8\]"),
        (arguments(reduction="avg"), WRONG_NAME, "reduction.*none.*sum.*mean"),
        (
            arguments(label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be finite and in \[0\.0, 1\.0\]",
        ),
        (arguments(z_loss=-0.1), ValueError, "z_loss must be finite and in"),
        (arguments(logit_soft_cap=0.0), ValueError, "logit_soft_cap must be positive"),
        (arguments(ignore_index=1.5), TypeError, "1.5"),
        (
            arguments(memory_budget=0),
            ValueError,
            "memory_budget must be an int of at least 1, got 0",
        ),
        (arguments(class_axis=1.0), TypeError, "class_axis must be an int, got 1.0"),
        (arguments(forward_mode=[1]), TypeError, r"forward_mode must be True or False, got \[1\]"),
        (arguments(class_axis=0), ValueError, r"kernel must have shape \[V, D\]"),
        (arguments(temp=2.0), TypeError, "unexpected keyword argument 'temp'"),
    ],
)
def test_calls(mesh, given, error, message):
    loss = ce_jax.on_mesh(LOSS, mesh, rows="data", classes="model", width="data")
    with pytest.raises(error, match=message):
        loss(**given)


def test_rows_that_do_not_divide_over_the_axes_of_width(mesh):
    loss = ce_jax.on_mesh(LOSS, mesh, rows=("data",), width=("data",))
    with pytest.raises(ValueError, match=r"hidden has 5 entries in axis 0.*Pad the rows"):
        loss(**arguments(rows=5))


def test_calls_with_logits(mesh):
    loss = ce_jax.on_mesh(DENSE, mesh, rows=P("data", "model"))
    with pytest.raises(ValueError, match=r"rows must name mesh axes for at most the 1 axes"):
        loss(np.ones((4, 8), np.float32), np.zeros(4, np.int32))
    loss = ce_jax.on_mesh(DENSE, mesh, rows="data", classes="model")
    with pytest.raises(ValueError, match=r"logits has 6 entries in axis 1.*logits with -inf"):
        loss(np.ones((4, 6), np.float32), np.zeros(4, np.int32))


def test_a_symbolic_batch():
    """JAX would export it, and the process would end where the program is called."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    loss = ce_jax.on_mesh(ce_jax.softmax_cross_entropy_with_integer_labels, mesh, rows="data")
    (batch,) = jax.export.symbolic_shape("2*b")
    shapes = [jax.ShapeDtypeStruct((batch, 4), "float32"), jax.ShapeDtypeStruct((batch,), "int32")]
    with pytest.raises(ValueError, match="shapes that are known"):
        jax.export.export(jax.jit(loss))(*shapes)
