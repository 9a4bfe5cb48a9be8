"""Losses of probabilities and log-probabilities, and label smoothing on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.comparison import check, close, together
from tests.helpers import LAYOUTS, combinations, covering, softmax_arguments

pytestmark = pytest.mark.sweep

NLL_OPTIONS = {
    "layout": list(LAYOUTS),
    "where": [None, "rows", "classes"],
    "weight": [False, True],
    "sample_weight": [False, True],
    "ignore_index": [None, -100, 1],
    "masked": [False, True],
    "label_smoothing": [None, 0.1, 1.0],
    "traced": [False, True],
    "reduction": [None, "sum", "mean"],
    "dtype": ["float32", "float64"],
}


@together(covering(seed=4, **NLL_OPTIONS))
def test_nll_loss(case):
    """Of any scores: nothing in the loss normalises them."""
    case = {key: value for key, value in case.items() if value is not None}
    dtype = jnp.dtype(case.pop("dtype"))
    wrt = ["label_smoothing"] if case.pop("traced") and "label_smoothing" in case else ()
    arguments = softmax_arguments(**case)
    check("nll_loss", {"log_probs": arguments.pop("logits"), **arguments}, wrt, dtype=dtype)


@pytest.mark.parametrize("where", [None, "rows", "classes"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nll_of_log_softmax_is_softmax_cross_entropy(where, reduction):
    arguments = softmax_arguments(
        where=where,
        weight=True,
        sample_weight=True,
        ignore_index=-100,
        label_smoothing=0.1,
        reduction=reduction,
    )
    logits = np.nan_to_num(arguments.pop("logits"), posinf=0, neginf=0).astype(np.float32)
    allowed = arguments["where"] if where == "classes" else None
    log_probs = jax.nn.log_softmax(logits, where=allowed)
    options = {
        key: np.float32(value) if key in ("weight", "sample_weight") else value
        for key, value in arguments.items()
    }
    np.testing.assert_allclose(
        ce_jax.nll_loss(log_probs, **options),
        ce_jax.softmax_cross_entropy_with_integer_labels(logits, **options),
        rtol=2e-6,
    )


def test_nll_narrow_dtypes():
    arguments = softmax_arguments(weight=True, sample_weight=True, label_smoothing=0.1)
    arguments = {"log_probs": arguments.pop("logits"), **arguments, "reduction": "mean"}
    check("nll_loss", arguments, dtype=jnp.dtype("bfloat16"))
    check("nll_loss", arguments, dtype=jnp.dtype("float16"))


def test_nll_of_impossible_and_invalid_labels():
    """An impossible label costs infinity; an id outside the classes is NaN, never wrapped."""
    log_probs = jnp.array([[-jnp.inf, 0.0]] * 4)
    labels = jnp.array([0, 1, -1, 2])

    def loss(log_probs):
        return ce_jax.nll_loss(log_probs, labels)

    losses, pull = jax.vjp(loss, log_probs)
    np.testing.assert_array_equal(losses, [np.inf, 0.0, np.nan, np.nan])
    (slopes,) = pull(jnp.ones(4))
    np.testing.assert_array_equal(slopes[1], [0.0, -1.0])
    assert np.isnan(slopes[2:]).any(axis=-1).all()


def binary_arguments(**options):
    draw = np.random.default_rng(0)
    shape = (4, 3)
    if options.pop("weight", False):
        options["weight"] = draw.uniform(0.5, 2.0, size=3)
    if options.pop("sample_weight", False):
        options["sample_weight"] = draw.uniform(0.5, 2.0, size=(4, 1))
        options["sample_weight"][1] = 0.0
    probs = draw.uniform(0.05, 0.95, size=shape)
    if options.pop("where", False):
        options["where"] = draw.random(shape) < 0.6
        probs[~options["where"]] = np.nan
    return {"probs": probs, "labels": draw.random(shape), **options}


@together(
    covering(
        weight=[False, True],
        sample_weight=[False, True],
        where=[False, True],
        label_smoothing=[None, 0.2, 1.0],
        traced=[False, True],
        reduction=[None, "sum", "mean"],
        dtype=["float16", "float32", "float64"],
    )
)
def test_binary_cross_entropy(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype = jnp.dtype(case.pop("dtype"))
    wrt = ["label_smoothing"] if case.pop("traced") and "label_smoothing" in case else ()
    # The slope 1/p of a probability that has been rounded is as exact as that probability.
    check("binary_cross_entropy", binary_arguments(**case), wrt, dtype=dtype)


def test_binary_cross_entropy_at_the_ends():
    """The logarithms stop at -100: certainty in the wrong label costs 100, not infinity."""
    probs = jnp.array([0.0, 0.0, 1.0, 1.0, 0.0])
    labels = jnp.array([0.0, 1.0, 0.0, 1.0, 0.25])
    losses = ce_jax.binary_cross_entropy(probs, labels)
    np.testing.assert_array_equal(losses, [0.0, 100.0, 100.0, 0.0, 25.0])
    slopes = jax.grad(lambda p: ce_jax.binary_cross_entropy(p, labels, reduction="sum"))(probs)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
def test_binary_labels_of_any_dtype(dtype):
    labels = np.array([1, 0], dtype)
    losses = ce_jax.binary_cross_entropy(jnp.array([0.8, 0.8]), labels)
    np.testing.assert_allclose(losses, -np.log([0.8, 0.2]), rtol=1e-6)


@together(
    combinations(axis=[-1, 0, (0, 1), None], masked=[False, True], alpha=[0.0, 0.1, 1.0]), size=12
)
def test_smooth_labels(case):
    masked = case.pop("masked")
    draw = np.random.default_rng(0)
    arguments = {"labels": draw.random((3, 4)), **case}
    if masked:
        arguments["where"] = draw.random((3, 4)) < 0.7
        arguments["where"][0] = arguments["labels"][~arguments["where"]] = 0
    check("smooth_labels", arguments, ["alpha"])


def test_smooth_labels_gives_the_loss_its_smoothing():
    """Smoothing the targets, and asking the loss to, are one thing; masked classes get nothing."""
    arguments = softmax_arguments(soft=True, where="classes", seed=5)
    logits = np.nan_to_num(arguments["logits"], posinf=0, neginf=0).astype(np.float32)
    labels, where = arguments["labels"].astype(np.float32), arguments["where"]
    smooth = ce_jax.smooth_labels(labels, 0.3, where=where)
    assert (smooth[~where] == 0.0).all()
    np.testing.assert_allclose(
        ce_jax.softmax_cross_entropy(logits, smooth, where=where),
        ce_jax.softmax_cross_entropy(logits, labels, where=where, label_smoothing=0.3),
        rtol=2e-6,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_smooth_labels_keeps_the_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        labels = jnp.eye(3, dtype=dtype)
        smooth = ce_jax.smooth_labels(labels, 0.5)
        assert smooth.dtype == dtype
        assert smooth.shape == (3, 3)
    truth = reference.smooth_labels(np.eye(3), 0.5)
    close(smooth, truth, 2**-8)
