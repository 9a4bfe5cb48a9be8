"""Sums and denominators in one call, how they add up, and reductions over some axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.calls import call, narrow, takes, truth
from tests.catalogue import CATALOGUE
from tests.comparison import close

pytestmark = pytest.mark.usefixtures("cheap_programs")

LOSSES = [name for name in CATALOGUE if name != "on_mesh" and takes(name, "reduction")]
INTEGER = ce_jax.softmax_cross_entropy_with_integer_labels
LABELS = np.array([[0, 3, -100], [-100, -100, -100], [1, -100, 2], [3, 3, 0]])
WEIGHTS = np.random.default_rng(1).uniform(0.5, 2.0, LABELS.shape)
LOGITS = np.random.default_rng(2).normal(size=(*LABELS.shape, 4))


def numbers_of_rows():
    """The loss of each row and its share of the denominator, in float64."""
    lse = np.log(np.sum(np.exp(LOGITS), -1))
    counts = LABELS != -100
    label = np.take_along_axis(LOGITS, np.where(counts, LABELS, 0)[..., None], -1)[..., 0]
    weights = np.where(counts, WEIGHTS, 0.0)
    return weights * (lse - label), weights


def true_gradient(of_total):
    """Of the inner product of the losses of rows with `of_total`, by the logits."""
    p = np.exp(LOGITS) / np.sum(np.exp(LOGITS), -1, keepdims=True)
    one_hot = np.eye(4)[np.where(LABELS == -100, 0, LABELS)]
    _, weights = numbers_of_rows()
    return (of_total * weights)[..., None] * (p - one_hot)


def ratio(logits, labels, weights, **options):
    return INTEGER(
        logits,
        labels,
        sample_weight=weights,
        ignore_index=-100,
        **{"reduction": "ratio", **options},
    )


def data():
    return jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS), jnp.asarray(WEIGHTS, jnp.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("name", LOSSES)
def test_total_and_denominator_of_every_loss(name):
    """Against the sums of the reference; what the mean divides by has no other factor."""
    exact = CATALOGUE[name].arrays()
    arrays = narrow(exact)
    (rows,) = truth(name, exact)
    weights = exact.get("sample_weight", np.ones(rows.shape))
    if "weight" in exact and np.issubdtype(exact["labels"].dtype, np.integer):
        weights = weights * exact["weight"][exact["labels"]]
    if name == "supervised_contrastive_loss":  # a row without a partner does not count
        weights = weights * (np.sum(exact["labels"][:, None] == exact["labels"], 1) > 1)
    total, denominator = call(name, arrays, reduction="ratio")
    close(total, np.sum(rows), 1e-5)
    close(denominator, np.sum(weights), 1e-6)
    (mean,) = call(name, arrays, reduction="mean")
    close(total / denominator, mean, 1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in LOSSES if takes(name, "reduction_axis")])
def test_reduction_axis_of_every_loss(name):
    exact = CATALOGUE[name].arrays()
    (rows,) = truth(name, exact)
    (found,) = call(name, narrow(exact), reduction="sum", reduction_axis=-1)
    close(found, np.sum(rows, -1), 1e-5)
    with pytest.raises(ValueError, match="reduction_axis=0 needs a reduction"):
        call(name, narrow(exact), reduction_axis=0)
    with pytest.raises(ValueError, match="reduction_axis must name axes of the loss"):
        call(name, narrow(exact), reduction="sum", reduction_axis=2)


def test_it_holds_arrays_also_without_jit():
    with jax.disable_jit():
        found = ce_jax.softmax_cross_entropy_with_integer_labels(
            jnp.zeros((2, 3)), jnp.array([0, 2]), reduction="ratio"
        )
    assert all(isinstance(x, jax.Array) for x in (found.total, found.denominator))


@pytest.mark.parametrize("axis", [None, 0, -1, (1, 0)])
def test_reduction_axis(axis):
    """One sequence has no row that counts: its mean is 0, and so is its gradient."""
    rows, weights = numbers_of_rows()
    axes = axis if axis is not None else (0, 1)
    denominator = np.sum(weights, axes, keepdims=True)
    cotangent = np.asarray(np.random.default_rng(3).normal(size=np.sum(rows, axes).shape))
    safe = np.where(denominator == 0, 1, denominator)
    expanded = cotangent.reshape(denominator.shape) / safe

    def scalar(logits, labels, weights):
        found = ratio(logits, labels, weights, reduction="mean", reduction_axis=axis)
        return jnp.sum(found * jnp.asarray(cotangent, jnp.float32)), found

    (_, found), slope = jax.jit(jax.value_and_grad(scalar, has_aux=True))(*data())
    close(found, np.sum(rows, axes) / safe.reshape(cotangent.shape), 1e-5)
    np.testing.assert_allclose(slope, true_gradient(expanded), rtol=1e-5, atol=1e-6)
    parts = ratio(*data(), reduction_axis=axis)
    close(parts.denominator, denominator.reshape(cotangent.shape), 1e-6)
    np.testing.assert_allclose(parts.mean(), found, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["mean", True, 1.0, (0, 0), (), np.array([0])])
def test_wrong_reduction_axes(wrong):
    kind = ValueError if isinstance(wrong, tuple) else TypeError
    with pytest.raises(kind, match="reduction_axis"):
        ratio(*data(), reduction_axis=wrong)


def whole():
    rows, weights = numbers_of_rows()
    return np.sum(rows) / np.sum(weights), true_gradient(1 / np.sum(weights))


def test_micro_batches_by_scan():
    """The second is empty. A carry of zeros, and gradients through both numbers."""

    def mean(logits, labels, weights):
        def add(so_far, part):
            return so_far + ratio(*part), None

        return jax.lax.scan(add, ce_jax.Ratio(0.0, 0.0), (logits, labels, weights))[0].mean()

    value, slopes = jax.jit(jax.value_and_grad(mean, (0, 2)))(*data())
    true, slope = whole()
    close(value, true, 1e-6)
    np.testing.assert_allclose(slopes[0], slope, rtol=1e-5, atol=1e-6)
    rows, weights = numbers_of_rows()
    by_weight = np.where(weights > 0, (rows / WEIGHTS - true) / np.sum(weights), 0)
    np.testing.assert_allclose(slopes[1], by_weight, rtol=1e-4, atol=1e-6)


def test_parts_add_up():
    logits, labels, weights = data()
    parts = [ratio(logits[i], labels[i], weights[i]) for i in range(4)]
    assert sum(parts[1:2]).mean() == 0
    close(sum(parts).mean(), whole()[0], 1e-6)
    close((parts[0] + parts[2] + parts[3]).mean(), whole()[0], 1e-6)
    for wrong in (1, 2.0, (1.0, 2.0)):
        with pytest.raises(TypeError):
            parts[0] + wrong
        with pytest.raises(TypeError):
            wrong + parts[0]


@pytest.mark.cpu
@pytest.mark.parametrize("weighted", [True, False])
def test_devices_by_psum(weighted):
    """Without weights or a mask the denominator is a constant of each device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def of_device(logits, labels, weights):
        part = (
            ratio(logits, labels, weights)
            if weighted
            else INTEGER(logits, jnp.zeros_like(labels), reduction="ratio")
        )
        if jax.__version_info__ >= (0, 9):
            return jax.lax.psum(part, "data").mean()
        # The derivative of one sum of several arrays fails there if one of them has none.
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), part).mean()

    loss = jax.shard_map(of_device, mesh=mesh, in_specs=P("data"), out_specs=P())
    value, slope = jax.jit(jax.value_and_grad(loss))(*data())
    if weighted:
        true, true_slope = whole()
    else:
        lse = np.log(np.sum(np.exp(LOGITS), -1))
        true = np.mean(lse - LOGITS[..., 0])
        true_slope = (np.exp(LOGITS - lse[..., None]) - np.eye(4)[0]) / LABELS.size
    close(value, true, 1e-6)
    np.testing.assert_allclose(slope, true_slope, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("linear", [False, True])
def test_on_mesh(linear, axis):
    """Reduced over the sharded axis, the other one, or both."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    logits, labels, weights = data()
    arrays = (logits, jnp.eye(4), labels) if linear else (logits, labels)
    function = ce_jax.linear_softmax_cross_entropy if linear else INTEGER
    loss = ce_jax.on_mesh(function, mesh, rows="data")
    options = {"sample_weight": weights, "ignore_index": -100, "reduction_axis": axis}
    found = loss(*arrays, reduction="ratio", **options)
    rows, share = numbers_of_rows()
    close(found.total, np.sum(rows, axis), 1e-5)
    close(found.denominator, np.sum(share, axis), 1e-6)
    mean = loss(*arrays, reduction="mean", **options)
    np.testing.assert_allclose(mean, found.mean(), rtol=1e-6)


def test_linear_by_tokens_and_some_axes():
    """A scalar goes by blocks of tokens, and a slice for each sequence by blocks of classes."""
    logits, labels, weights = data()
    options = {"sample_weight": weights, "ignore_index": -100, "reduction": "ratio"}
    rows, share = numbers_of_rows()
    for axis in (None, (0, 1), 1):
        found = ce_jax.linear_softmax_cross_entropy(
            logits, jnp.eye(4), labels, reduction_axis=axis, **options
        )
        close(found.total, np.sum(rows, axis), 1e-5)
        close(found.denominator, np.sum(share, axis), 1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_counts(name):
    """A mean of 0 with gradient 0, also through the ratio."""
    if not takes(name, "sample_weight"):
        pytest.skip("has no weights of examples")
    arrays = narrow(CATALOGUE[name].arrays())
    smooth = {k: arrays[k] for k in CATALOGUE[name].smooth() if k != "sample_weight"}
    shape = truth(name, CATALOGUE[name].arrays())[0].shape

    def mean(smooth):
        options = {**arrays, **smooth, "sample_weight": jnp.zeros(shape)}
        return ce_jax.Ratio(*call(name, options, reduction="ratio")).mean()

    value, slopes = jax.jit(jax.value_and_grad(mean))(smooth)
    assert value == 0
    for key, slope in slopes.items():
        np.testing.assert_array_equal(slope, np.zeros_like(slope), err_msg=key)


@pytest.mark.parametrize("jit", [False, True])
def test_over_nothing(jit):
    """An infinite total over 0 is 0 with derivatives of 0, of all orders; NaN, an error, stays."""

    def mean(total, denominator):
        return ce_jax.Ratio(total, denominator).mean()

    def wrap(function):
        return jax.jit(function) if jit else function

    for total in (3.0, np.inf, -np.inf):
        numbers = jnp.float32(total), jnp.float32(0)
        assert wrap(mean)(*numbers) == 0
        assert [*wrap(jax.grad(mean, (0, 1)))(*numbers)] == [0, 0]
        np.testing.assert_array_equal(wrap(jax.hessian(mean, (0, 1)))(*numbers), np.zeros((2, 2)))
    assert np.isnan(wrap(mean)(jnp.float32(np.nan), jnp.float32(0)))


def test_derivatives_of_a_mean():
    """Of a total and a denominator that depend on one number; one may be constant, or no array."""

    def mean(x, total=None, denominator=None):
        total = x**3 if total is None else total
        denominator = 1 + x * x if denominator is None else denominator
        return ce_jax.Ratio(total, denominator).mean()

    def derivatives(function):
        orders = function, jax.grad(function), jax.grad(jax.grad(function))
        return [order(jnp.float32(2)) for order in orders]

    # x - x / (1 + x^2), and so on, at 2.
    close(derivatives(mean), [8 / 5, 28 / 25, -4 / 125], 1e-5)
    close(derivatives(lambda x: mean(x, denominator=4)), [2, 3, 3], 1e-5)
    close(derivatives(lambda x: mean(x, total=3)), [3 / 5, -12 / 25, 66 / 125], 1e-5)


@pytest.mark.parametrize("name", ["weights that cancel", "an overflow that weighs nothing"])
def test_an_infinite_loss_over_nothing(name):
    """The mean is 0 where its denominator is."""
    if name == "weights that cancel":
        logits = jnp.array([[0.0, -jnp.inf], [0.0, 0.0]])
        options = {"sample_weight": jnp.array([1.0, -1.0])}
    else:  # the square of the normaliser, which class weights do not weigh
        logits = jnp.array([[0.0, 3e20], [0.0, 3e20]])
        options = {"weight": jnp.array([1.0, 0.0]), "z_loss": 1.0}
    labels = jnp.array([1, 1])
    assert not np.isfinite(INTEGER(logits, labels, **options, reduction="sum"))
    value, slope = jax.value_and_grad(INTEGER)(logits, labels, **options, reduction="mean")
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
