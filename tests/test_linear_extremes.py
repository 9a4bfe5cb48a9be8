"""The linear form of logits that are far from 0 or from one another."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from tests.test_linear_traps import by_class, by_token, pulled


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "_FEWEST_TOKENS", 1)
        yield


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_a_row_whose_logits_are_all_far_from_zero(level, forward_mode):
    """What nothing was seen of is 0 relative to -inf: moved to -300 it must stay 0, and not NaN."""
    hidden, labels = jnp.array([[1.0], [0.0]]), jnp.array([4, 0])
    kernel, options = jnp.full((1, 5), level), {"forward_mode": forward_mode}
    for how in (by_class(2), {} if forward_mode else by_token(5, 1)):
        value, (d_hidden, d_kernel) = pulled(
            lambda *x, how=how: ce_jax.linear_softmax_cross_entropy(
                *x, labels, label_smoothing=0.1, **options, **how
            ),
            hidden,
            kernel,
        )
        np.testing.assert_allclose(value.sum(), 2 * np.log(5.0), rtol=1e-6)
        np.testing.assert_allclose(d_hidden, 0, atol=1e-4)
        slope = np.full(5, 0.2) - 0.9 * (np.arange(5) == 4) - 0.02
        np.testing.assert_allclose(d_kernel[0], slope, rtol=1e-5)


@pytest.mark.parametrize("low", [(0, 1), (2, 3), (4, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("forward_mode", [False, True])
def test_classes_that_are_as_far_apart_as_numbers_can_be(low, forward_mode):
    """Two at -3e38, where weights are 0, among others at 3e38: 0 times inf is 0 here.

    In blocks of two classes: they are the first, the middle or the last, or are in two blocks.
    """
    low = np.isin(np.arange(6), low)
    kernel = jnp.where(low, -3e38, 3e38)[None]
    weight = jnp.where(low, 0.0, 1.0 + jnp.arange(6.0))
    label = int(np.flatnonzero(~low)[1])

    def loss(kernel, weight):
        return ce_jax.linear_softmax_cross_entropy(
            jnp.ones((1, 1)),
            kernel,
            jnp.array([label]),
            weight=weight,
            label_smoothing=0.3,
            forward_mode=forward_mode,
            **by_class(1),
        )

    value, (d_kernel, d_weight) = pulled(loss, kernel, weight)
    target = np.asarray(0.7 * (np.arange(6) == label) * weight + 0.3 / 6 * weight)
    np.testing.assert_allclose(value, target.sum() * np.log(4), rtol=1e-6)
    slope = np.where(low, 0, target.sum() / 4) - target
    np.testing.assert_allclose(d_kernel[0], slope, rtol=1e-5, atol=1e-6)
    share = np.log(4) * (0.7 * (np.arange(6) == label) + 0.3 / 6)
    np.testing.assert_allclose(d_weight[~low], share[~low], rtol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("distance", [-300.0, -60.0, 100.0])
def test_blocks_that_are_nothing_beside_what_was_seen(distance, forward_mode):
    """The exponentials of a block may all round to 0 relative to the maximum of those before it."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=6) + distance * np.repeat([0.0, 1.0, 2.0], 2)
    weight, g = rng.uniform(0.5, 2.0, 6), rng.normal(size=(4, 6))
    labels = jnp.arange(6)

    def numbers(kernel, weight):
        hidden = jnp.ones((6, 1))
        loss, found = ce_jax.linear_softmax_cross_entropy(
            hidden,
            kernel,
            labels,
            weight=weight,
            label_smoothing=0.3,
            return_statistics=True,
            forward_mode=forward_mode,
            **by_class(6),
        )
        return jnp.stack([loss, found.lse, found.log_prob, found.entropy]), found.argmax

    def total(kernel, weight):
        return jnp.sum(jnp.asarray(g, jnp.float32) * numbers(kernel, weight)[0])

    kernel, narrow_weight = jnp.asarray(z, jnp.float32)[None], jnp.asarray(weight, jnp.float32)
    z = np.asarray(kernel[0], float)
    found, argmax = numbers(kernel, narrow_weight)
    d_kernel, d_weight = jax.grad(total, (0, 1))(kernel, narrow_weight)

    lse = z.max() + np.log(np.exp(z - z.max()).sum())
    p, surprise = np.exp(z - lse), lse - z
    entropy = p @ surprise
    target = 0.7 * np.diag(weight) + 0.3 / 6 * weight
    truth = np.stack([target @ surprise, np.full(6, lse), -surprise, np.full(6, entropy)])
    np.testing.assert_allclose(found, truth, rtol=3e-6, atol=3e-6)
    np.testing.assert_array_equal(argmax, z.argmax())
    slope = (target.sum(1) @ g[0] + g[1].sum() - g[2].sum()) * p - g[0] @ target + g[2]
    slope += g[3].sum() * p * (surprise - entropy)
    np.testing.assert_allclose(d_kernel[0], slope, rtol=2e-5, atol=2e-5)
    share = 0.7 * g[0] + 0.3 / 6 * g[0].sum()
    np.testing.assert_allclose(d_weight, share * surprise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_an_entropy_that_is_nearly_nothing_has_its_digits(forward_mode):
    """It is what one class leaves to the others. That one's own part, 1/51, rounds to 0."""
    z = np.array([0.0, -50.0, -50.0, -51.0])

    def entropy(kernel):
        found = ce_jax.linear_softmax_statistics(
            jnp.ones((1, 1)), kernel, jnp.array([1]), forward_mode=forward_mode, **by_class(1)
        )
        return found.entropy[0]

    value, (slope,) = pulled(entropy, jnp.asarray(z, jnp.float32)[None])
    p = np.exp(z) / np.exp(z).sum()
    surprise = np.log1p(np.exp(z[1:]).sum()) - z
    np.testing.assert_allclose(value, p @ surprise, rtol=1 / 40)
    np.testing.assert_allclose(slope[0, 1:], (p * (surprise - p @ surprise))[1:], rtol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("distance", [-60.0, 60.0])
def test_three_derivatives_of_blocks_that_are_nothing_beside_others(distance):
    """They divide by powers of a block's sum of exponentials, which may be e^-120."""
    rng = np.random.default_rng(1)
    z = np.float32(rng.normal(size=6) + distance * np.repeat([0.0, 1.0, 2.0], 2))
    along, g, label = np.float32(rng.normal(size=6)), np.float32(rng.normal(size=3)), 2

    def total(t):
        loss, found = ce_jax.linear_softmax_cross_entropy(
            jnp.ones((1, 1)),
            (z + t * along)[None],
            jnp.array([label]),
            label_smoothing=0.3,
            return_statistics=True,
            forward_mode=True,
            **by_class(1),
        )
        return g @ jnp.stack([loss, found.lse, found.entropy])[:, 0]

    def truth(t):
        moved = [mpmath.mpf(float(a)) + t * float(b) for a, b in zip(z, along, strict=True)]
        lse = mpmath.log(sum(map(mpmath.exp, moved)))
        loss = 0.7 * (lse - moved[label]) + 0.3 / 6 * sum(lse - x for x in moved)
        entropy = sum(mpmath.exp(x - lse) * (lse - x) for x in moved)
        return float(g[0]) * loss + float(g[1]) * lse + float(g[2]) * entropy

    for order in range(1, 4):
        before = total
        total = functools.partial(_slope, before)
        expected = float(mpmath.diff(truth, 0, order))
        np.testing.assert_allclose(jax.jit(total)(0.0), expected, rtol=1e-4, atol=1e-5)


def _slope(function, t):
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]
