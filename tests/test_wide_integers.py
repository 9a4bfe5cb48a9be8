"""Integers that do not fit into 32 bits, of which JAX keeps the lower half without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests.arguments import ARGUMENTS

pytestmark = pytest.mark.usefixtures("cheap_programs")

OF_IDS = [
    (function, name)
    for function, arguments in ARGUMENTS.items()
    for name, x in arguments.items()
    if isinstance(x, np.ndarray) and x.dtype.kind == "i" and name != "counts"
]
MANY = 2**33 + 6


@pytest.mark.sweep
@pytest.mark.parametrize(("function", "name"), OF_IDS)
def test_ids(function, name):
    """What fits is the same number; what does not raises."""
    call, arguments = getattr(ce_jax, function), ARGUMENTS[function]
    x = arguments[name].astype(np.int64)
    found, wanted = call(**arguments | {name: x}), call(**arguments)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for wrong in (x + 2**32, x - 2**32, x.astype(np.uint64) + 2**32):
        with pytest.raises(ValueError, match=f"{name} must hold integers of 32 bits"):
            call(**arguments | {name: wrong})


class ArrayLike:
    """What is an array to NumPy, as a column of a table."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


class Variable(ArrayLike):
    """And to JAX, as a variable of Flax."""

    def __jax_array__(self):
        return np.asarray(self.x)


@pytest.mark.parametrize("form", [list, ArrayLike, Variable])
def test_other_forms(form):
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(loss(jnp.zeros((2, 3)), form([0, 1])), np.log(3), rtol=1e-6)
    with pytest.raises(ValueError, match="labels must hold integers of 32 bits"):
        loss(jnp.zeros((2, 3)), form([2**32, 1]))
    with pytest.raises(TypeError, match="labels must hold numbers"):
        loss(jnp.zeros((2, 3)), form([2**70, 1]))
    weights = ce_jax.balanced_weights(form([MANY, 5]))
    np.testing.assert_array_equal(weights, ce_jax.balanced_weights([float(MANY), 5.0]))
    bits = ce_jax.bits_per_byte([1e10, 2.0], form([MANY, 5]))
    np.testing.assert_array_equal(bits, ce_jax.bits_per_byte([1e10, 2.0], [float(MANY), 5.0]))


def test_ids_in_a_named_tuple():
    arguments = dict(ARGUMENTS["linear_sampled_softmax_cross_entropy"])
    negatives = arguments["negatives"]
    arguments["negatives"] = negatives._replace(ids=np.asarray(negatives.ids, np.int64) + 2**32)
    with pytest.raises(ValueError, match=r"negatives.ids must hold integers of 32 bits"):
        ce_jax.linear_sampled_softmax_cross_entropy(**arguments)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint64])
@pytest.mark.parametrize("function", ["bits_per_byte", "perplexity"])
def test_numbers_of_items(function, kind):
    call = getattr(ce_jax, function)
    np.testing.assert_array_equal(call(1e10, kind(MANY)), call(1e10, float(MANY)))


@pytest.mark.parametrize(
    "function",
    [
        "inverse_frequency_weights",
        "balanced_weights",
        "effective_number_weights",
        "training_logit_offset",
        "prediction_logit_offset",
    ],
)
def test_counts_of_classes(function):
    call, counts = getattr(ce_jax, function), np.array([MANY, 5, 7])
    np.testing.assert_array_equal(call(counts), call(counts.astype(float)))


def test_other_numbers():
    many = np.array([MANY, 5])
    np.testing.assert_array_equal(ce_jax.focal_alpha([3.0, 4.0], many), np.float32([1, 0.2]))
    np.testing.assert_array_equal(
        ce_jax.prior_shift_weights(many, many), ce_jax.prior_shift_weights(1.0 * many, 1.0 * many)
    )
    for number in (MANY, np.int64(MANY), many):
        mean = ce_jax.Ratio(1.0, number).mean()
        np.testing.assert_array_equal(mean, 1 / np.float32(number))
        np.testing.assert_array_equal(ce_jax.Ratio(number, 2.0).mean(), np.float32(number) / 2)
        both = ce_jax.Ratio(1.0, number) + ce_jax.Ratio(jnp.float32(1), jnp.float32(2))
        np.testing.assert_array_equal(both.mean(), 2 / (np.float32(number) + 2))


@pytest.mark.usefixtures("x64")
def test_with_x64_they_are_what_they_are():
    logits, labels = jnp.zeros((2, 3)), np.array([1, 2**32 + 1])
    loss = ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(loss, [np.log(3), np.nan])
