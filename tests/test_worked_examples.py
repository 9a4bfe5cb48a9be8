"""Numbers that textbooks print, each to the digits they print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax

LOGITS = jnp.array(
    [[-0.5215, -0.4240, 0.8907], [-0.2820, 0.0445, 1.3734], [-1.0393, 0.8725, 0.1539]]
)
LABELS = jnp.array([1, 2, 0])


def printed(found, expected, decimals):
    """`found` prints as `expected` does, half a unit of the last decimal either way."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5001 * 10.0**-decimals)


def test_gradient_is_p_minus_y():
    logits = jnp.log(jnp.array([0.34, 0.46, 0.20]))
    gradient = jax.grad(ce_jax.softmax_cross_entropy_with_integer_labels)(logits, jnp.int32(0))
    np.testing.assert_allclose(gradient, [-0.66, 0.46, 0.20], rtol=1e-6)


def test_mean_loss_from_logits():
    loss = ce_jax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS, reduction="mean")
    printed(loss, 1.5025, 4)


def test_mean_loss_from_log_probabilities():
    log_probs = jax.nn.log_softmax(LOGITS)
    printed(ce_jax.nll_loss(log_probs, LABELS, reduction="mean"), 1.5025, 4)


def test_softmax_and_log_softmax_of_the_statistics():
    classes = jnp.broadcast_to(jnp.arange(3), (3, 3))
    rows = jnp.broadcast_to(LOGITS[:, None], (3, 3, 3))
    log_probs = ce_jax.softmax_statistics(rows, classes).log_prob
    printed(jnp.exp(log_probs[0]), [0.1611, 0.1776, 0.6613], 4)
    printed(log_probs[2], [-2.4036, -0.4918, -1.2104], 4)


def test_binary_entropy_in_bits():
    printed(ce_jax.binary_entropy(jnp.array([0.1, 0.999]), base=2), [0.4690, 0.0114], 4)


def test_self_information_and_entropy():
    p = jnp.array([0.7, 0.2, 0.1])
    printed(ce_jax.self_information(p), [0.36, 1.61, 2.30], 2)
    printed(ce_jax.entropy(p), 0.80, 2)


def test_minus_log_of_four_fifths():
    log_probs = jnp.log(jnp.array([0.8, 0.2]))
    printed(ce_jax.nll_loss(log_probs, jnp.int32(0)), 0.223, 3)
    printed(ce_jax.self_information(jnp.float32(0.8)), 0.223, 3)


def test_categorical():
    logits = jnp.log(jnp.array([0.3, 0.6, 0.1]))
    printed(ce_jax.softmax_cross_entropy(logits, jnp.array([0.0, 1.0, 0.0])), 0.511, 3)


def test_sum_of_binary():
    loss = ce_jax.binary_cross_entropy(
        jnp.array([0.1, 0.7, 0.8]), jnp.array([0.0, 1.0, 1.0]), reduction="sum"
    )
    printed(loss, 0.685, 3)


@pytest.mark.parametrize(("probs", "expected"), [((0.5, 0.2, 0.3), 0.55), ((0.8, 0.1, 0.1), 0.19)])
def test_sum_of_binary_in_base_ten(probs, expected):
    labels = jnp.array([1.0, 0.0, 0.0])
    loss = ce_jax.binary_cross_entropy(jnp.array(probs), labels, reduction="sum")
    printed(loss / np.log(10.0), expected, 2)
    logits = jax.scipy.special.logit(jnp.array(probs))
    loss = ce_jax.sigmoid_binary_cross_entropy(logits, labels, reduction="sum")
    printed(loss / np.log(10.0), expected, 2)


@pytest.mark.parametrize("base", [np.e, 2, 10, 1.5])
def test_cross_entropy_is_entropy_plus_divergence(base):
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), size=2).astype(np.float32)
    found = ce_jax.cross_entropy(p, q, base=base)
    parts = ce_jax.entropy(p, base=base) + ce_jax.kl_divergence(p, q, base=base)
    np.testing.assert_allclose(found, parts, rtol=2e-6)
    np.testing.assert_allclose(found, -np.sum(p * np.log(q)) / np.log(base), rtol=2e-6)


def test_chain_rule_of_the_sigmoid():
    """dE/dp = -(c/p) + (1-c)/(1-p), dp/ds = p(1-p), and their product is p - c."""
    draw = np.random.default_rng(0)
    scores = jnp.asarray(draw.normal(size=8), jnp.float32)
    c = jnp.asarray(draw.random(8), jnp.float32)
    p = jax.nn.sigmoid(scores)
    of_p = jax.grad(lambda p: ce_jax.binary_cross_entropy(p, c, reduction="sum"))(p)
    np.testing.assert_allclose(of_p, -(c / p) + (1 - c) / (1 - p), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(of_p * p * (1 - p), p - c, rtol=2e-5, atol=1e-6)
    of_scores = jax.grad(lambda s: ce_jax.sigmoid_binary_cross_entropy(s, c, reduction="sum"))(
        scores
    )
    np.testing.assert_allclose(of_scores, p - c, rtol=2e-5, atol=1e-6)
