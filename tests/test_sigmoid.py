"""The sigmoid loss: values and every gradient over the option space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.helpers import GARBAGE, check, close, covering, named, result_dtype

pytestmark = pytest.mark.sweep

NAME = "sigmoid_binary_cross_entropy"
SHAPE = (4, 3)
# What broadcasts to the elements: a number for each, for each class, for each row, or one for all.
SPREAD = {"element": SHAPE, "class": SHAPE[1:], "row": (SHAPE[0], 1), "one": ()}
OPTIONS = {
    "weight": [None, *SPREAD],
    "pos_weight": [None, *SPREAD],
    "sample_weight": [None, *SPREAD],
    "where": [None, "element", "row"],
    "label_smoothing": [None, 0.2, 1.0],
    "traced": [False, True],
    "reduction": [None, "sum", "mean"],
    "forward_mode": [None, True],
    "dtype": ["float32", "float64"],
}


def sigmoid_arguments(*, weight=None, pos_weight=None, sample_weight=None, where=None, **options):
    draw = np.random.default_rng(0)
    logits, labels = 3 * draw.normal(size=SHAPE), draw.random(SHAPE)
    labels[0] = 0.0, 1.0, 0.5
    weights = {"weight": weight, "pos_weight": pos_weight, "sample_weight": sample_weight}
    for name, spread in weights.items():
        if spread is not None:
            options[name] = draw.uniform(0.5, 2.0, size=SPREAD[spread])
    if sample_weight in ("element", "row"):
        options["sample_weight"].flat[1] = 0.0
    if where is not None:
        options["where"] = draw.random(SPREAD[where]) < 0.6
        counts = np.broadcast_to(options["where"], SHAPE)
        logits[~counts] = np.resize(GARBAGE, (~counts).sum())
    return {"logits": logits, "labels": labels, **options}


@pytest.mark.parametrize("case", covering(seed=3, **OPTIONS), ids=named)
def test_values_and_gradients(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype, forward_mode = jnp.dtype(case.pop("dtype")), case.pop("forward_mode", None)
    wrt = ["label_smoothing"] if case.pop("traced") and "label_smoothing" in case else ()
    check(NAME, sigmoid_arguments(**case), wrt, dtype=dtype, forward_mode=forward_mode)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_round_once(dtype, reduction):
    arguments = sigmoid_arguments(
        weight="class",
        pos_weight="class",
        sample_weight="row",
        where="element",
        label_smoothing=0.2,
        reduction=reduction,
    )
    check(NAME, arguments, dtype=jnp.dtype(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_shapes(shape, reduction):
    draw = np.random.default_rng(0)
    arguments = {"logits": draw.normal(size=shape), "labels": draw.random(shape)}
    arguments = {key: np.asarray(value) for key, value in arguments.items()}
    check(NAME, arguments | {"reduction": reduction})


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32"])
def test_labels_of_any_dtype(dtype):
    logits = jnp.array([[0.3, -2.0], [1.5, 4.0]])
    labels = np.array([[1, 0], [0, 1]])
    found = ce_jax.sigmoid_binary_cross_entropy(logits, labels.astype(dtype), label_smoothing=0.1)
    exact = {"logits": np.asarray(logits, float), "labels": labels, "label_smoothing": 0.1}
    close(found, reference.sigmoid_binary_cross_entropy(**exact), 2e-6)


def test_infinite_logits():
    """At +-inf the loss is 0 where the label agrees and inf where it does not; slopes are p - y."""
    logits = jnp.array([jnp.inf, jnp.inf, jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.5])
    for forward_mode in (False, True):
        losses = ce_jax.sigmoid_binary_cross_entropy(logits, labels, forward_mode=forward_mode)
        np.testing.assert_array_equal(losses, [0.0, np.inf, np.inf, np.inf, 0.0, np.inf])
    slopes = jax.grad(lambda z: ce_jax.sigmoid_binary_cross_entropy(z, labels, reduction="sum"))(
        logits
    )
    np.testing.assert_array_equal(slopes, [0.0, 1.0, 0.5, -1.0, 0.0, -0.5])


@pytest.mark.parametrize("pos_weight", [0.25, 3.0])
def test_infinite_logits_with_pos_weight(pos_weight):
    logits = jnp.array([jnp.inf, jnp.inf, -jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 1.0, 0.0])
    value, slopes = jax.value_and_grad(
        lambda z: ce_jax.sigmoid_binary_cross_entropy(
            z,
            labels,
            pos_weight=pos_weight,
            where=jnp.array([True, False, False, True]),
            reduction="sum",
        )
    )(logits)
    np.testing.assert_array_equal(slopes, 0.0)
    assert value == 0.0
    losses = ce_jax.sigmoid_binary_cross_entropy(logits, labels, pos_weight=pos_weight)
    np.testing.assert_array_equal(losses, [0.0, np.inf, np.inf, 0.0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_error_is_not_above_the_naive_formulas(dtype, spread):
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(spread * draw.normal(size=4096), dtype)
        labels = jnp.asarray(draw.random(4096), dtype)

        def naive(z):
            one = jnp.ones((), z.dtype)
            return -labels * jax.nn.log_sigmoid(z) - (one - labels) * jax.nn.log_sigmoid(-z)

        def ours(z):
            return ce_jax.sigmoid_binary_cross_entropy(z, labels)

        losses, pull = jax.vjp(ours, logits)
        (slopes,) = pull(jnp.ones(4096, result_dtype(dtype)))
        plain, pull = jax.vjp(naive, logits)
        (plain_slopes,) = pull(jnp.ones(4096, dtype))
    z, y = np.asarray(logits, np.longdouble), np.asarray(labels, np.longdouble)
    truth = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    true_slopes = 1 / (1 + np.exp(-z)) - y

    def error(found, exact):
        return float(np.sqrt(np.mean((np.asarray(found, np.longdouble) - exact) ** 2)))

    assert error(losses, truth) <= 1.1 * error(plain, truth)
    assert error(slopes, true_slopes) <= 1.1 * error(plain_slopes, true_slopes)


def test_large_logits_keep_small_losses():
    """softplus(-80) is 1.8e-35, not 0, and its slope is as small."""
    z = jnp.array([80.0, -80.0])
    labels = jnp.array([1.0, 0.0])
    losses = ce_jax.sigmoid_binary_cross_entropy(z, labels)
    np.testing.assert_allclose(losses, np.exp(-80.0), rtol=1e-5)
    slopes = jax.grad(lambda z: ce_jax.sigmoid_binary_cross_entropy(z, labels, reduction="sum"))(z)
    np.testing.assert_allclose(slopes[1], np.exp(-80.0), rtol=1e-5)
