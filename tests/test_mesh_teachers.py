"""Distillation of global arrays on meshes of eight devices, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ce_jax
from tests import reference_distillation
from tests.helpers import GARBAGE
from tests.mesh import LAYOUTS
from tests.test_mesh import compare

BATCH, LENGTH, WIDTH, CLASSES, HELD, KNOWN = 8, 2, 8, 21, 24, 3
EXPLICIT = AxisType.Explicit

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.usefixtures("x64", "cheap_programs", "tiles_of_one_row"),
]


def problem():
    """Arguments of all forms; a row that does not count holds garbage."""
    draw = np.random.default_rng(21)
    rows = (BATCH, LENGTH)
    where = draw.random(rows) < 0.7
    where[0, 0], where[4:6] = False, [[True, True], [False, True]]
    order = np.argsort(draw.random((*rows, CLASSES)), -1)[..., :KNOWN]
    known = draw.uniform(0.2, 1.0, (*rows, KNOWN))
    known *= 0.8 / known.sum(-1, keepdims=True)
    arrays = {
        "logits": draw.normal(size=(*rows, HELD)),
        "teacher_logits": draw.normal(size=(*rows, HELD)),
        "hidden": draw.normal(size=(*rows, WIDTH)),
        "kernel": draw.normal(size=(WIDTH, HELD)),
        "bias": draw.normal(size=HELD),
        "teacher_hidden": draw.normal(size=(*rows, WIDTH)),
        "teacher_kernel": draw.normal(size=(HELD, WIDTH)),
        "teacher_bias": draw.normal(size=HELD),
        "teacher_ids": order,
        "teacher_log_probs": np.log(known),
    }
    for name in ("logits", "hidden", "teacher_hidden"):
        arrays[name][~where] = np.resize(GARBAGE, arrays[name].shape[-1])
    shared = {
        "where": where,
        "sample_weight": draw.uniform(0.5, 2.0, rows),
        "temperature": draw.uniform(0.8, 2.0, rows),
    }
    return arrays, shared


def check(name, layout, arrays, wrt, axis_type=AxisType.Auto, **options):
    given, shared = problem()
    compare(
        getattr(ce_jax, name),
        getattr(reference_distillation, name),
        LAYOUTS[layout],
        {k: given[k] for k in arrays} | shared,
        (*wrt, "sample_weight", "temperature"),
        axis_type,
        **options,
    )


DENSE = ("logits", "teacher_logits")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("distillation_loss", {}),
        ("distillation_loss", {"reverse": True}),
        ("jensen_shannon_loss", {"beta": 0.3}),
    ],
)
def test_logits(name, options, reduction):
    """Rows, positions and classes spread."""
    axis_type = EXPLICIT if reduction == "mean" else AxisType.Auto
    layout = "data-sequence-tensor"
    check(name, layout, DENSE, DENSE, axis_type, reduction=reduction, **options)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_known_classes(tail):
    """The student's logits are spread by classes, the ids by rows alone."""
    arrays = ("logits", "teacher_ids", "teacher_log_probs")
    wrt = ("logits", "teacher_log_probs")
    check("top_k_distillation_loss", "data-tensor", arrays, wrt, tail=tail)


STUDENT = ("hidden", "kernel", "bias")
TEACHER = ("teacher_hidden", "teacher_kernel", "teacher_bias")


@pytest.mark.parametrize("layout", ["fsdp-tensor", "data-fsdp-tensor"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear_distillation_loss", {"teacher_logit_soft_cap": 3.0}),
        ("linear_jensen_shannon_loss", {"beta": 0.3}),
    ],
)
def test_layers(name, options, layout):
    """Both kernels are spread by classes and by width; the teacher's lies the other way round."""
    arrays = STUDENT + TEACHER
    options = options | {"teacher_class_axis": 0, "num_classes": CLASSES, "reduction": "mean"}
    check(name, layout, arrays, arrays, **options)


def test_logits_of_a_teacher():
    arrays = (*STUDENT, "teacher_logits")
    check("linear_distillation_loss", "fsdp-tensor", arrays, arrays)


def test_known_classes_of_a_layer():
    arrays = (*STUDENT, "teacher_ids", "teacher_log_probs")
    wrt = (*STUDENT, "teacher_log_probs")
    options = {"num_classes": CLASSES, "reduction": "mean"}
    check("linear_top_k_distillation_loss", "fsdp-tensor", arrays, wrt, **options)
    check("linear_top_k_distillation_loss", "data", arrays, wrt, EXPLICIT, **options)


def test_a_weight_of_zero_beside_classes_that_are_masked_on_one_device():
    """The slope by that weight is the row's loss, whatever padding holds."""
    layout = LAYOUTS["data-tensor"]
    given, _ = problem()
    arrays = {k: given[k] for k in STUDENT} | {"teacher_logits": given["teacher_logits"].copy()}
    arrays["hidden"] = np.where(np.isfinite(arrays["hidden"]), arrays["hidden"], 0.5)
    arrays["teacher_logits"][1, 0, :6] = -np.inf  # all that the first of four devices holds
    arrays["teacher_logits"][..., CLASSES:] = np.inf
    arrays["sample_weight"] = np.ones((BATCH, LENGTH))
    arrays["sample_weight"][1, 0] = 0
    options = {"num_classes": CLASSES, "reduction": "sum"}
    compare(
        ce_jax.linear_distillation_loss,
        reference_distillation.linear_distillation_loss,
        layout,
        arrays,
        ("hidden", "kernel", "sample_weight"),
        **options,
    )
    loss = ce_jax.on_mesh(ce_jax.linear_distillation_loss, layout.mesh(), **layout.spread)
    by_row = loss(**arrays, num_classes=CLASSES, reduction="sum", reduction_axis=[1])
    total = reference_distillation.linear_distillation_loss(**arrays, **options)
    np.testing.assert_allclose(np.sum(by_row), total, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "of_teacher", "options"),
    [
        ("linear_distillation_loss", TEACHER, {"teacher_class_axis": 0}),
        ("linear_jensen_shannon_loss", TEACHER, {"teacher_class_axis": 0}),
        ("linear_top_k_distillation_loss", ("teacher_ids", "teacher_log_probs"), {}),
    ],
)
def test_batched_masks(name, of_teacher, options):
    """Each of a batch of masks has its own number of rows that count, on each device."""
    layout = LAYOUTS["fsdp-tensor"]
    function = getattr(ce_jax, name)
    loss = ce_jax.on_mesh(function, layout.mesh(), **layout.spread)
    given, _ = problem()
    fixed = {k: jnp.asarray(given[k]) for k in of_teacher}
    arrays = {k: jnp.asarray(given[k]) for k in STUDENT}
    arrays, fixed = (
        {k: jnp.where(jnp.isfinite(x), x, 0).astype(x.dtype) for k, x in some.items()}
        for some in (arrays, fixed)
    )
    where = jnp.asarray(np.random.default_rng(3).random((3, BATCH, LENGTH)) < 0.4)

    def batched(loss):
        def total(arrays, where):
            return jnp.sum(jnp.sin(loss(**arrays, **fixed, **options, where=where)))

        return jax.jit(jax.vmap(jax.value_and_grad(total), (None, 0)))(arrays, where)

    found, wanted = batched(loss), batched(function)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


def test_beta_is_checked_before_it_is_traced():
    mesh = LAYOUTS["data"].mesh()
    loss = ce_jax.on_mesh(ce_jax.jensen_shannon_loss, mesh, rows="data")
    run = functools.partial(loss, np.zeros((8, 3)), np.zeros((8, 3)))
    with pytest.raises(ValueError, match="beta must be above 0 and below 1, got 0"):
        run(beta=0.0)
