"""Masks, weights and reductions: what counts, what the mean divides by, and how parts add up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.comparison import close
from tests.helpers import covering, named, softmax_arguments

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

INTEGER = "softmax_cross_entropy_with_integer_labels"


def softmax_problem():
    draw = np.random.default_rng(0)
    return {
        "logits": jnp.asarray(draw.normal(size=(6, 4)), jnp.float32),
        "labels": jnp.array([0, 3, 1, 2, 1, -100]),
        "weight": jnp.asarray(draw.uniform(0.5, 2.0, size=4), jnp.float32),
        "sample_weight": jnp.asarray(draw.uniform(0.5, 2.0, size=6), jnp.float32).at[1].set(0.0),
        "where": jnp.array([True, True, False, True, True, True]),
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
    }


@pytest.mark.parametrize(
    "case",
    covering(
        weight=[False, True],
        sample_weight=[False, True],
        ignore_index=[None, -100, 1],
        where=[None, "rows"],
        layout=["last", "middle", "vector"],
    ),
    ids=named,
)
def test_mean_denominator(case):
    arguments = softmax_arguments(**case)
    del arguments["logits"], arguments["axis"]
    options = {
        key: np.float32(value) if key in ("weight", "sample_weight") else value
        for key, value in arguments.items()
    }
    found = ce_jax.mean_denominator(**options)
    assert found.shape == ()
    assert found.dtype == jnp.float32
    close(found, reference.mean_denominator(**arguments), 1e-6)


@pytest.mark.parametrize("sample_weight", [None, 2.0, "row", "element"])
def test_mean_denominator_of_float_arrays(sample_weight):
    """The elements of the sigmoid loss, or the rows of soft labels: only the shape is used."""
    draw = np.random.default_rng(0)
    shapes = {"row": (3, 1), "element": (3, 4)}
    if sample_weight in shapes:
        sample_weight = jnp.asarray(draw.random(shapes[sample_weight]), jnp.float32)
    where = draw.random((3, 4)) < 0.5
    found = ce_jax.mean_denominator(jnp.ones((3, 4)), sample_weight=sample_weight, where=where)
    weights = 1.0 if sample_weight is None else np.asarray(sample_weight, float)
    close(found, np.sum(where * weights), 1e-6)


def test_mean_denominator_of_labels_that_are_no_class():
    weight, labels = jnp.array([0.5, 1.5]), jnp.array([1, 2, -1])
    for sample_weight, total in ((None, np.nan), (jnp.array([2.0, 0.0, 0.0]), 3.0)):
        found = ce_jax.mean_denominator(labels, weight=weight, sample_weight=sample_weight)
        np.testing.assert_allclose(found, total)
        where = jnp.array([True, False, False])
        assert ce_jax.mean_denominator(labels, weight=weight, where=where) == 1.5


def test_mean_is_sum_over_denominator():
    problem = softmax_problem()
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    names = ("labels", "weight", "sample_weight", "where", "ignore_index")
    denominator = ce_jax.mean_denominator(**{name: problem[name] for name in names})
    total = loss(**problem, reduction="sum")
    np.testing.assert_allclose(loss(**problem, reduction="mean"), total / denominator, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(loss(**problem)), total, rtol=1e-6)


def test_gradient_accumulation_is_exact():
    """Sums of parts over the sum of their denominators: the mean of the whole and its gradient."""
    problem = softmax_problem()
    logits = problem.pop("logits")
    by_row = {name: problem.pop(name) for name in ("labels", "sample_weight", "where")}
    loss = ce_jax.softmax_cross_entropy_with_integer_labels

    def mean(logits):
        return loss(logits, **by_row, **problem, reduction="mean")

    def part(logits, rows):
        parts = {name: value[rows] for name, value in by_row.items()}
        return loss(logits[rows], **parts, **problem, reduction="sum")

    names = ("weight", "ignore_index")
    slices = [slice(0, 1), slice(1, 4), slice(4, 6)]
    denominators = [
        ce_jax.mean_denominator(
            **{name: value[rows] for name, value in by_row.items()},
            **{name: problem[name] for name in names},
        )
        for rows in slices
    ]
    parts = [
        jax.jit(jax.value_and_grad(functools.partial(part, rows=rows)))(logits) for rows in slices
    ]
    values, slopes = zip(*parts, strict=True)
    value, slope = jax.jit(jax.value_and_grad(mean))(logits)
    np.testing.assert_allclose(sum(values) / sum(denominators), value, rtol=2e-6)
    np.testing.assert_allclose(sum(slopes) / sum(denominators), slope, rtol=2e-6, atol=1e-7)


NOTHING_COUNTS = {
    "every row ignored": {"labels": jnp.array([-100, -100]), "ignore_index": -100},
    "every row masked": {"where": jnp.array([False, False])},
    "every class masked": {"where": jnp.zeros((2, 3), bool)},
    "every sample weight 0": {"sample_weight": jnp.zeros(2)},
    "every class weight 0": {"weight": jnp.zeros(3)},
}


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("reason", NOTHING_COUNTS)
def test_nothing_counts(reason, reduction, forward_mode):
    """A denominator of 0: loss 0 and gradient 0, where torch gives NaN."""
    options = {"labels": jnp.array([0, 2])} | NOTHING_COUNTS[reason]
    loss = functools.partial(
        ce_jax.softmax_cross_entropy_with_integer_labels,
        **options,
        reduction=reduction,
        label_smoothing=0.1,
        forward_mode=forward_mode,
    )
    value, slopes = jax.jit(jax.value_and_grad(loss))(
        jnp.array([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]])
    )
    assert value == 0.0
    np.testing.assert_array_equal(slopes, 0.0)


@pytest.mark.parametrize("options", [{"where": False}, {"sample_weight": 0.0}])
@pytest.mark.parametrize(
    "name", ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "binary_cross_entropy"]
)
def test_nothing_counts_in_losses_of_soft_labels(name, options):
    options = {
        key: jnp.full((2,) if name == "softmax_cross_entropy" else (2, 3), value)
        for key, value in options.items()
    }
    loss = functools.partial(getattr(ce_jax, name), **options, reduction="mean")
    value, slopes = jax.jit(jax.value_and_grad(loss))(jnp.full((2, 3), 0.3), jnp.full((2, 3), 0.4))
    assert value == 0.0
    np.testing.assert_array_equal(slopes, 0.0)


def test_nothing_counts_in_nll_loss():
    value, slopes = jax.value_and_grad(ce_jax.nll_loss)(
        jnp.log(jnp.full((2, 4), 0.25)), jnp.array([7, 7]), ignore_index=7, reduction="mean"
    )
    assert value == 0.0
    np.testing.assert_array_equal(slopes, 0.0)


def test_class_weights_of_zero_under_smoothing():
    """The labels' classes weigh 0, others not: the mean has nothing to divide by, the sum has."""
    options = {
        "labels": jnp.array([0, 0]),
        "weight": jnp.array([0.0, 1.0, 1.0]),
        "label_smoothing": 0.3,
    }
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    value, slopes = jax.value_and_grad(loss)(jnp.zeros((2, 3)), **options, reduction="mean")
    assert value == 0.0
    np.testing.assert_array_equal(slopes, 0.0)
    total = loss(jnp.zeros((2, 3)), **options, reduction="sum")
    np.testing.assert_allclose(total, 2 * 0.3 * 2 / 3 * np.log(3.0), rtol=1e-6)


def test_soft_labels_divide_by_rows_and_integer_labels_by_class_weights():
    """torch's two denominators: one-hot labels and ids of the same classes have different means."""
    logits, weight = jnp.array([[1.0, 0.0], [0.5, 2.0]]), jnp.array([1.0, 3.0])
    labels = jnp.array([0, 1])
    total = ce_jax.softmax_cross_entropy(logits, jnp.eye(2), weight=weight, reduction="sum")
    soft = ce_jax.softmax_cross_entropy(logits, jnp.eye(2), weight=weight, reduction="mean")
    integer = ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, weight=weight, reduction="mean"
    )
    np.testing.assert_allclose([soft, integer], [total / 2, total / 4], rtol=1e-6)


@functools.partial(jax.jit, static_argnames="name")
def in_every_reduction(logits, labels, *, name=INTEGER, **options):
    """One program for the three."""
    return [
        getattr(ce_jax, name)(logits, labels, **options, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    ]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sample_weight", [2.0, ((2.0,),), ((1.0,), (3.0,)), ((1, 2, 3),)])
def test_sample_weight_broadcasts_to_the_loss(sample_weight, soft):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 0, 1]])
    name = "softmax_cross_entropy" if soft else INTEGER
    labels = jax.nn.one_hot(labels, 4) if soft else labels
    weights = jnp.asarray(sample_weight, jnp.float32)
    full = jnp.asarray(np.broadcast_to(weights, (2, 3)))
    found = in_every_reduction(logits, labels, sample_weight=weights, name=name)
    wanted = in_every_reduction(logits, labels, sample_weight=full, name=name)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 1), (1, 3, 4), (2, 1), (1, 3), (1, 1)])
def test_where_broadcasts(shape):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    labels = jnp.zeros((2, 3), jnp.int32)
    where = np.random.default_rng(1).random(shape) < 0.6
    where.flat[0] = True
    full = np.broadcast_to(where, (2, 3, 4)[: len(shape)])
    found = in_every_reduction(logits, labels, where=where)
    wanted = in_every_reduction(logits, labels, where=full)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
