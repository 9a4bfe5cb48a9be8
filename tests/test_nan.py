"""A NaN that counts, or what is no probability, is seen in the result: no mask hides it.

XLA turns the product with a bool into a select, which passes over the NaN: so `0 * nan` is no way
to make a loss NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests.calls import call, narrow, truth
from tests.catalogue import CATALOGUE

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

# Their references raise an error for NaN.
NAN_EVERYWHERE = "fit_temperature", "effective_number_weights"
# Of these confidences it only says how many there are.
NO_BIN = {"reliability_bins"}


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in NO_BIN])
def test_an_argument_of_nan(name):
    """Wherever the formula gives NaN, for each argument in turn."""
    run = jax.jit(functools.partial(call, name))
    given = CATALOGUE[name].arrays()
    for key in (key for key, x in given.items() if x.dtype.kind == "f"):
        arrays = given | {key: np.full_like(given[key], np.nan)}
        found = run(narrow(arrays))
        if name in NAN_EVERYWHERE:
            wanted = [np.full(x.shape, np.nan) for x in found]
        else:
            with np.errstate(invalid="ignore"):
                wanted = truth(name, arrays)
        for x, y in zip(found, wanted, strict=True):
            assert np.isnan(x)[np.isnan(y)].all(), key


# Labels as they may come: of the last two the compiler sees that they are 0 or 1.
LABELS = {
    "float": lambda y: y,
    "bool": lambda y: y > 0,
    "compared": lambda y: (y > 0.5).astype(jnp.float32),
}
YES = np.float32([0, 1, 0, 1, 0])


def value_and_slope(loss, x, labels):
    def total(x, y):
        losses = loss(x, LABELS[labels](y))
        return losses.sum(), losses

    slope, losses = jax.jit(jax.grad(total, has_aux=True))(x, YES)
    return losses, slope


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "loss",
    [
        ce_jax.sigmoid_binary_cross_entropy,
        functools.partial(ce_jax.sigmoid_binary_cross_entropy, forward_mode=True),
        functools.partial(ce_jax.sigmoid_binary_cross_entropy, pos_weight=2.0, forward_mode=True),
        functools.partial(ce_jax.sigmoid_focal_loss, alpha=0.25),
        ce_jax.binary_cross_entropy,
    ],
)
def test_binary_labels(loss, labels):
    x = np.float32([np.nan, np.nan, 0.2, 0.7, np.nan])
    for found in value_and_slope(loss, x, labels):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(x))


@pytest.mark.parametrize("labels", LABELS)
def test_what_is_no_probability(labels):
    p = np.float32([-0.5, -1e-7, 0.2, 1.5, 1 + 1e-6])
    impossible = [True, True, False, True, True]
    for found in value_and_slope(ce_jax.binary_cross_entropy, p, labels):
        np.testing.assert_array_equal(np.isnan(found), impossible)
    silent = functools.partial(ce_jax.binary_cross_entropy, sample_weight=np.float32([0] * 5))
    for found in value_and_slope(silent, p, labels):
        np.testing.assert_array_equal(found, 0)


def test_a_class_weight_of_zero_too():
    p = np.float32([-0.5, 0.2])
    loss = functools.partial(
        ce_jax.binary_cross_entropy, labels=jnp.ones(2), weight=jnp.array([0.0, 1.0])
    )
    np.testing.assert_allclose(loss(p), [0, -np.log(0.2)], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda p: loss(p).sum())(p), [0, -5], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_answer_without_a_probability(beta):
    log_prob, desirable = jnp.array([jnp.nan, -1.0]), jnp.array([True, False])
    loss = functools.partial(ce_jax.kto_loss, desirable=desirable, kl=0.1, beta=beta)
    slope = jax.grad(lambda x: loss(x, -jnp.ones(2)).sum())(log_prob)
    for found in (loss(log_prob, -jnp.ones(2)), slope):
        np.testing.assert_array_equal(np.isnan(found), [True, False])


def test_log_probabilities_with_smoothing():
    """-inf is a class that is not allowed; NaN is none."""
    log_probs = np.float32([[-1, np.nan, -1], [-1, -np.inf, -1]])
    loss = functools.partial(ce_jax.nll_loss, labels=jnp.array([0, 2]), label_smoothing=0.1)
    np.testing.assert_array_equal(np.isnan(loss(log_probs)), [True, False])


def test_a_negative_share_that_is_traced():
    """It is no class without examples."""
    counts = np.float32([-1, 2, 3])
    for rule in (ce_jax.training_logit_offset, ce_jax.prediction_logit_offset):
        np.testing.assert_array_equal(np.isnan(jax.jit(rule)(counts)), counts < 0)
