"""The linear form of logits that are far from 0 or from one another."""

import jax.numpy as jnp
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
