"""Numbers that keep their digits where a shorter formula loses them; truths are in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax

pytestmark = pytest.mark.sweep


def close(found, truth, relative=3e-6):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, truth, rtol=relative, atol=0)


def softplus(x):
    return np.logaddexp(0.0, np.asarray(x, np.float64))


@pytest.mark.parametrize(("samples", "items"), [(1, 10**6), (1, 10**7), (16, 10**7), (10, 10**8)])
def test_gbce_of_many_items(samples, items):
    """beta is the share of the items that are drawn: of a million it is small."""
    beta = samples / (items - 1)
    negatives = jnp.full((1, samples), -1e4)
    value, slope = jax.value_and_grad(
        lambda z: ce_jax.gbce_loss(z, negatives, num_items=items, calibration=1.0)[0]
    )(jnp.zeros(1))
    close(value, beta * np.log(2) / (samples + 1))
    close(slope, [-beta / 2 / (samples + 1)])


@pytest.mark.parametrize("p", [1e-30, 1e-9, 3e-8, 1e-6, 1e-4, 0.1, 0.3, 0.9, 0.999])
def test_binary_cross_entropy_of_a_small_probability(p):
    p = jnp.float32(p)
    close(ce_jax.binary_cross_entropy(p, 0), -np.log1p(-np.float64(p)))
    close(jax.grad(ce_jax.binary_cross_entropy)(p, jnp.float32(0)), 1 / (1 - np.float64(p)))


@pytest.mark.parametrize(
    ("label", "negative", "temperature"),
    [(1e4, 1e4 - 0.01, 0.01), (1000, 999.9, 0.05), (30, 29.99, 0.01), (1e36, 1e36, 1e-3)],
)
def test_sampled_losses_divide_differences_by_the_temperature(label, negative, temperature):
    """Quotients may be a hundred times as large as their difference, and are rounded."""
    z, n, t = jnp.float32([label]), jnp.float32([[negative]]), jnp.float32(temperature)
    ahead = (np.float64(z[0]) - np.float64(n[0, 0])) / np.float64(t)
    for loss in (ce_jax.bpr_loss, ce_jax.sampled_softmax_cross_entropy):
        value, slopes = jax.value_and_grad(
            lambda z, n, loss=loss: loss(z, n, temperature=t)[0], (0, 1)
        )(z, n)
        close(value, softplus(-ahead))
        slope = np.exp(-softplus(ahead)) / np.float64(t)
        close(slopes[0], [-slope])
        close(slopes[1], [[slope]])


def test_sampled_losses_with_a_temperature_of_each_row_and_excluded_negatives():
    draw = np.random.default_rng(0)
    label, negatives = 1e3 + draw.normal(size=4), 1e3 + draw.normal(size=(4, 3))
    temperature, where = draw.uniform(0.1, 2.0, size=4), draw.random((4, 3)) < 0.7
    label, negatives, temperature = (np.float32(x) for x in (label, negatives, temperature))
    ahead = (np.float64(label)[:, None] - negatives) / np.float64(temperature)[:, None]
    options = {"temperature": temperature, "where": where}
    mean = np.sum(where * softplus(-ahead), -1) / where.sum(-1)
    close(ce_jax.bpr_loss(label, negatives, **options), mean)
    sampled = np.log1p(np.sum(where * np.exp(-ahead), -1))
    close(ce_jax.sampled_softmax_cross_entropy(label, negatives, **options), sampled)


@pytest.mark.parametrize("classes", [10, 1000, 131072])
def test_divergence_of_distributions_that_differ_by_a_third(classes):
    p = np.full(classes, 1 / classes, np.float32)
    q = p.copy()
    q[::2] *= 1.3
    q[1::2] *= 0.7
    p64, q64 = np.float64(p), np.float64(q)
    close(ce_jax.kl_divergence(p, q), np.sum(p64 * np.log(p64 / q64)), 1e-6)
    close(jax.grad(ce_jax.kl_divergence)(p, q), np.log(p64 / q64) + 1, 1e-6)


@pytest.mark.parametrize(("p", "q"), [(1e-20, 1.3e-20), (1e-30, 0.9), (0.9, 1e-30), (1e-36, 1e-35)])
def test_divergence_of_tiny_probabilities(p, q):
    p, q = jnp.float32([p]), jnp.float32([q])
    p64, q64 = np.float64(p), np.float64(q)
    close(ce_jax.kl_divergence(p, q), np.sum(p64 * np.log(p64 / q64)), 1e-6)
    second = jax.grad(lambda q: jax.grad(ce_jax.kl_divergence)(p, q)[0])(q)
    close(second, -1 / q64)


MARGINS = [-30.0, -20.0, -16.0, -10.0, -1.0, 0.0, 1.0, 10.0, 20.0, 30.0]


@pytest.mark.parametrize("margin", MARGINS)
def test_curvature_of_preferences(margin):
    """`p (1 - p)`, however sure the model is, on either side."""
    truth = np.exp(-softplus(margin) - softplus(-margin))
    losses = (
        lambda x: ce_jax.dpo_loss(x, 0.0, 0.0, 0.0, beta=1.0),
        lambda x: ce_jax.simpo_loss(x, 0.0, beta=1.0, gamma=0.0),
    )
    for loss in losses:
        for hessian in (jax.hessian(loss), jax.jacrev(jax.grad(loss))):
            close(hessian(jnp.float32(margin)), truth)


@pytest.mark.parametrize("logit", [-30.0, -22.0, -10.0, 0.0, 10.0])
def test_curvature_of_the_poly_loss(logit):
    """`p (1 - p) (4 p - 1)` with epsilon 2."""
    p = np.exp(-softplus(-logit))
    labels = jnp.array([1.0, 0.0])
    found = jax.hessian(
        lambda z: ce_jax.poly_loss_cross_entropy(
            jnp.stack([z, jnp.zeros_like(z)]), labels, epsilon=2.0
        )
    )(jnp.float32(logit))
    np.testing.assert_allclose(found, p * (1 - p) * (4 * p - 1), rtol=3e-6, atol=1e-6 * p)


@pytest.mark.parametrize("ahead", MARGINS)
def test_curvature_of_the_third_estimate_of_the_divergence(ahead):
    estimate = functools.partial(ce_jax.kl_estimate, kind="k3")
    found = jax.hessian(lambda x: estimate(x, jnp.float32(ahead)))(jnp.float32(0))
    close(found, np.exp(ahead))


def test_a_label_that_is_no_class_is_not_missed_where_the_first_class_is_masked():
    logits = jnp.array([[-jnp.inf, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 0.5]])
    labels = jnp.array([7, 0, 2])
    fit = functools.partial(ce_jax.fit_temperature, logits, labels)
    assert jnp.isnan(fit())
    assert jnp.isnan(fit(sample_weight=jnp.ones(3)))
    assert jnp.isfinite(fit(sample_weight=jnp.array([0.0, 1.0, 1.0])))
