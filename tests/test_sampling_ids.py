"""Sampled classes whose ids are no classes, or have a dtype too narrow to count the classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax import Negatives
from tests.test_sampling import NAN, linear

pytestmark = pytest.mark.usefixtures("cheap_programs")


def test_what_is_no_class():
    """A label or a negative out of range is NaN in its rows; hits alone leave a loss of 0."""
    hidden, kernel = jnp.ones((3, 2)), jnp.ones((2, 4))
    labels = jnp.array([1, 4, 2])
    negatives = Negatives(jnp.array([[0, 3], [0, 3], [2, 2]]), jnp.zeros((3, 2)))

    @jax.jit
    def both(hidden, negatives):
        loss = functools.partial(
            ce_jax.linear_sampled_softmax_cross_entropy, kernel=kernel, labels=labels
        )
        value, pull = jax.vjp(lambda hidden: loss(hidden, negatives=negatives), hidden)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = both(hidden, negatives)
    np.testing.assert_allclose(value, [np.log(3), NAN, 0], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, False])
    value, _ = both(hidden, negatives._replace(ids=negatives.ids.at[0, 1].set(-1)))
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])


SILENCED = {
    "where": {"where": np.array([True, False])},
    "ignore_index": {"ignore_index": 2},
    "sample_weight": {"sample_weight": np.array([1.0, 0.0], np.float32)},
}


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("reason", SILENCED)
def test_what_is_no_class_in_rows_that_do_not_count(reason, forward_mode):
    """It reaches no gradient; in a row that counts it reaches its own."""
    hidden, kernel, labels = jnp.ones((2, 2)), jnp.ones((2, 4)), jnp.array([1, 2])
    ids, log_count = jnp.array([[0, 3], [-1, 9]]), jnp.zeros((2, 2))
    total = functools.partial(linear, labels=labels, reduction="sum", forward_mode=forward_mode)

    @jax.jit
    def gradients(options, ids):
        def of(hidden, kernel, bias, log_count):
            arrays = {"hidden": hidden, "kernel": kernel, "bias": bias}
            return total(ids, log_count, **arrays, **options, **fixed)

        return jax.grad(of, (0, 1, 2, 3))(hidden, kernel, jnp.zeros(4), log_count)

    options = dict(SILENCED[reason])
    fixed = {k: options.pop(k) for k in ("ignore_index",) if k in options}
    third = np.array([1, -2, 0, 1]) / 3  # of each class's logit, by the row that counts
    expected = np.zeros((2, 2)), np.stack([third, third]), third, np.array([[-1, -1], [0, 0]]) / 3
    for found, wanted in zip(gradients(options, ids), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
        silent = found[..., 2] if wanted.shape[-1] == 4 else found[1]
        np.testing.assert_array_equal(silent, 0)
    of_hidden, of_kernel, *_ = gradients(options, ids.at[0, 1].set(-1))
    np.testing.assert_array_equal(np.isnan(of_hidden).any(-1), [True, False])
    assert np.isnan(of_kernel).any()


@pytest.mark.parametrize(("dtype", "items"), [("uint8", 256), ("int8", 200), ("int16", 50_000)])
def test_ids_too_narrow_for_the_number_of_classes(dtype, items):
    negatives = Negatives(jnp.array([3, 100], dtype), jnp.zeros(2))
    hidden, kernel = jnp.ones((2, 2)), jnp.zeros((2, items))
    labels = jnp.array([1, 3])
    loss = ce_jax.linear_sampled_softmax_cross_entropy(hidden, kernel, labels, negatives)
    np.testing.assert_allclose(loss, np.log([3, 2]), rtol=1e-6)
    ids = np.array([0, 1, np.iinfo(dtype).max], dtype)
    expected = np.log(np.log1p(1 / (ids + 1.0)) / np.log1p(items))
    np.testing.assert_allclose(ce_jax.log_uniform_log_prob(ids, items), expected, rtol=1e-6)
