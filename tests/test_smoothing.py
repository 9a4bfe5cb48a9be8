"""Smoothing over the other classes, and the constant that goes with it."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import ce_jax
from tests.comparison import accuracy, close, slopes_everywhere
from tests.helpers import compilations

mp = mpmath.mp


def test_it_is_the_loss_of_the_target_written_out():
    """Value and gradient, as Flax' examples and T5X have them, constant included."""
    eps, classes = 0.1, 5
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(6, classes)), draw.integers(classes, size=6)
    targets = np.full((6, classes), eps / (classes - 1))
    targets[np.arange(6), labels] = 1 - eps
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    constant = -(1 - eps) * np.log(1 - eps) - eps * np.log(eps / (classes - 1))

    @jax.jit
    def ours(logits, eps):
        smoothing = ce_jax.smoothing_over_others(eps, classes)
        loss = ce_jax.softmax_cross_entropy_with_integer_labels(
            logits, labels, label_smoothing=smoothing
        )
        return loss - ce_jax.smoothed_label_entropy(smoothing, classes)

    x = jnp.asarray(logits, jnp.float32)
    value, slope = ours(x, eps), jax.jit(jax.grad(lambda x: ours(x, eps).sum()))(x)
    close(value, -np.sum(targets * log_p, -1) - constant, 1e-5)
    close(slope, np.exp(log_p) - targets, 1e-5)
    perfect = ours(jnp.log(jnp.asarray(targets, jnp.float32)), eps)
    np.testing.assert_allclose(perfect, 0, atol=1e-6)
    by_eps = jax.jit(jax.grad(lambda eps: ours(x, eps).sum()))(eps)
    step = np.where(np.arange(classes) == labels[:, None], -1.0, 1 / (classes - 1))
    slopes = -np.sum(step * log_p, -1) + np.sum(step * np.log(targets), -1)
    np.testing.assert_allclose(by_eps, slopes.sum(), rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 128256])
def test_share_of_the_others(classes):
    most = (classes - 1) / classes
    for eps in (0.0, most / 3, most):
        found = ce_jax.smoothing_over_others(eps, classes)
        assert 0 <= found <= 1
        np.testing.assert_allclose(found, eps / most if most else 0, rtol=1e-6)
    if most:
        assert ce_jax.smoothing_over_others(np.float32(most), classes) == 1
    slope = jax.grad(ce_jax.smoothing_over_others)(0.1, classes)
    np.testing.assert_allclose(slope, 1 / most if most else 0, rtol=1e-6)
    assert ce_jax.smoothing_over_others(jnp.bfloat16(0.1), classes).dtype == jnp.float32


@pytest.mark.parametrize("classes", [2, 5, 128256])
def test_entropy_of_the_label(classes):
    """Value and slope to the last digits, from next to nothing up to the uniform distribution."""
    at = np.float32([1e-30, 1e-6, 0.1, 0.49, 0.51, 0.9, 1 - 2.0**-23, 1.0])

    def exact(s):
        q = s / classes
        p = 1 - s + q
        return -p * mp.log(p) - (classes - 1) * q * mp.log(q)

    value, slope = slopes_everywhere(
        jax.vmap(lambda s: ce_jax.smoothed_label_entropy(s, classes)), at
    )
    with mp.workdps(80):
        exactly = [mp.mpf(float(s)) for s in at]
        wanted = [float(exact(s)) for s in exactly]
        slopes = [float(mp.diff(exact, s)) for s in exactly[:-1]]
    np.testing.assert_allclose(value, wanted, rtol=accuracy("float32"))
    np.testing.assert_allclose(slope[:-1], slopes, rtol=accuracy("float32"))
    assert slope[-1] == 0
    np.testing.assert_allclose(value[-1], np.log(classes), rtol=1e-6)


def test_limits_of_the_entropy():
    def both(classes):
        return jax.value_and_grad(ce_jax.smoothed_label_entropy)(0.0, classes)

    assert both(5) == (0, np.inf)
    for smoothing in (0.0, 0.3, 1.0):
        assert ce_jax.smoothed_label_entropy(smoothing, 1) == 0
        assert jax.grad(ce_jax.smoothed_label_entropy)(smoothing, 1) == 0
    with jax.enable_x64(True):
        found = ce_jax.smoothed_label_entropy(jnp.float64(0.5), 3)
        np.testing.assert_allclose(found, -2 / 3 * np.log(2 / 3) - np.log(1 / 6) / 3, rtol=1e-14)


def test_a_schedule_compiles_once():
    @jax.jit
    def scheduled(eps):
        return ce_jax.smoothed_label_entropy(ce_jax.smoothing_over_others(eps, 5), 5)

    scheduled(0.1)
    with compilations() as seen:
        scheduled(0.2)
    assert not seen


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.smoothing_over_others(0.9, 5), ValueError, r"eps .*0\.8\].* 0.9"),
        (lambda: ce_jax.smoothing_over_others(-0.1, 5), ValueError, "eps .* -0.1"),
        (lambda: ce_jax.smoothing_over_others(0.1, 0), ValueError, "num_classes .* 0"),
        (lambda: ce_jax.smoothing_over_others(0.1, 5.0), TypeError, "num_classes"),
        (lambda: ce_jax.smoothing_over_others(jnp.ones(2) / 9, 5), ValueError, r"eps .*\(2,\)"),
        (lambda: ce_jax.smoothed_label_entropy(1.5, 5), ValueError, "label_smoothing .* 1.5"),
        (lambda: ce_jax.smoothed_label_entropy("0.1", 5), TypeError, "label_smoothing"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
