"""Gradients taken outside `jit`: after the first call nothing is compiled any more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests.helpers import compilations

pytestmark = pytest.mark.usefixtures("cheap_programs")

HIDDEN = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 4096)).astype(np.float32)
LABELS = np.arange(6)
SMALL = {"memory_budget": 1 << 16}  # several blocks

LOSSES = {
    "class ids": lambda h: ce_jax.softmax_cross_entropy_with_integer_labels(h, LABELS % 3),
    "statistics": lambda h: ce_jax.softmax_statistics(h, LABELS % 3).entropy,
    "soft labels": lambda h: ce_jax.softmax_cross_entropy(h, jnp.ones_like(h) / 3),
    "smoothed": lambda h: ce_jax.softmax_cross_entropy_with_integer_labels(
        h, LABELS % 3, label_smoothing=0.1
    ),
    "sigmoid": lambda h: ce_jax.sigmoid_binary_cross_entropy(h, jnp.ones_like(h)),
    "sigmoid mean": lambda h: ce_jax.sigmoid_binary_cross_entropy(
        h, jnp.ones_like(h), reduction="mean"
    ),
    "linear": lambda h: ce_jax.linear_softmax_cross_entropy(h, KERNEL, LABELS, **SMALL),
    "linear mean": lambda h: ce_jax.linear_softmax_cross_entropy(
        h, KERNEL, LABELS, reduction="mean", **SMALL
    ),
    "linear statistics": lambda h: (
        ce_jax.linear_softmax_statistics(h, KERNEL, LABELS, **SMALL).log_prob
    ),
    "linear distillation": lambda h: ce_jax.linear_distillation_loss(
        h, KERNEL, teacher_hidden=HIDDEN, teacher_kernel=KERNEL, **SMALL
    ),
    "linear Jensen-Shannon": lambda h: ce_jax.linear_jensen_shannon_loss(
        h, KERNEL, teacher_hidden=HIDDEN, teacher_kernel=KERNEL, **SMALL
    ),
    "linear top k": lambda h: ce_jax.linear_top_k_distillation_loss(
        h, KERNEL, LABELS[:, None], jnp.full((len(LABELS), 1), -0.5), **SMALL
    ),
    "contrastive": lambda h: ce_jax.clip_loss(h, 2 * h),
    "contrastive statistics": lambda h: ce_jax.clip_loss(h, 2 * h, return_statistics=True)[0],
    "preferences": lambda h: ce_jax.dpo_loss(h, -h, h, HIDDEN),
    "odds": lambda h: ce_jax.orpo_loss(-jnp.abs(h), -jnp.abs(HIDDEN)),
    "policies": lambda h: ce_jax.ppo_clip_loss(h, HIDDEN, HIDDEN) + ce_jax.kl_estimate(h, HIDDEN),
}


@pytest.mark.parametrize("devices", ["eight", pytest.param("one", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_compile_once(name, devices, request):
    if devices == "one":
        request.getfixturevalue("one_device")

    def gradient():
        return jax.value_and_grad(lambda h: jnp.mean(LOSSES[name](h)))(jnp.asarray(HIDDEN))

    first = gradient()
    with compilations() as seen:
        second = gradient()
    assert not seen
    np.testing.assert_array_equal(first[1], second[1])
