r"""Losses of a policy in reinforcement learning, from log-probabilities of sampled tokens.

They take log-probabilities of tokens, for example from `softmax_statistics` or
`linear_softmax_statistics`. JAX differentiates them by its own rules, in any mode and order.
Advantages and the log-probabilities of the sampling policy are usually constants: use
`jax.lax.stop_gradient`, or compute them outside of the differentiated function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import checks, reductions
from ._arguments.compiled import compiled
from ._arguments.log_probs import examples_of, reduced
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows.numerics import expm1_less_x

Kind: TypeAlias = Literal["k1", "k2", "k3"]


@reducible
def ppo_clip_loss(
    log_prob: ArrayLike,
    old_log_prob: ArrayLike,
    advantage: ArrayLike,
    *,
    where: ArrayLike | None = None,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Proximal policy optimisation (PPO): the clipped policy-gradient loss of each token.

    .. math::
      \ell = -\min \big( r A, \; \mathrm{clip}(r, 1 - \mathrm{low}, 1 + \mathrm{high}) \, A \big),
      \qquad r = \frac{p(y)}{p_\mathrm{old}(y)}

    Where the clipped term is the smaller one, the gradient is 0, also if r overflows. Where the
    unclipped term is the smaller one, for example above :math:`1 + \mathrm{high}` with a negative
    advantage, the ratio is not clipped.

    Args:
      log_prob: log-probability of the token that was drawn `[...]`, in nats.
      old_log_prob: log-probability of the same token under the policy that drew it, of the same
        shape.
      advantage: A, a scalar or an array with the axes of `log_prob` (size 1 broadcasts): `[B, 1]`
        for one advantage per sequence.
      where: bool: the tokens that count, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      low: the ratio is clipped below at `1 - low`; in [0, 1]. May be traced.
      high: the ratio is clipped above at `1 + high`; at least 0. May be traced.
      sample_weight: weight of each token, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the tokens that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `log_prob` or `[]`, in float32 (float64 if any of the first three
      arrays is float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_prob, old = jnp.log(jnp.array([0.9, 0.9])), jnp.log(jnp.array([0.6, 0.6]))
      >>> print(ce_jax.ppo_clip_loss(log_prob, old, jnp.array([1.0, -1.0])))
      [-1.2  1.5]

    References:
      Schulman et al., `Proximal Policy Optimization Algorithms`, 2017; with different bounds: Yu et
      al., `DAPO: An Open-Source LLM Reinforcement Learning System at Scale`, 2025.
    """
    return _ppo_clip(
        log_prob,
        old_log_prob,
        advantage,
        where,
        scalar("low", low, 0.0, 1.0),
        scalar("high", high, low=0.0),
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _ppo_clip(
    log_prob: Array,
    old_log_prob: Array,
    advantage: Array,
    where: Array | None,
    low: Array,
    high: Array,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    arrays = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantage": advantage}
    examples = examples_of(arrays, where, sample_weight, broadcast=("advantage",))

    def loss(ours: Array, old: Array, advantage: Array) -> Array:
        gains, log_ratio = advantage >= 0, ours - old
        bound = jnp.where(gains, 1 + high.astype(ours.dtype), 1 - low.astype(ours.dtype))
        ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
        held = jnp.where(gains, ratio > bound, ratio < bound)
        # No gradient may pass through an exponential that overflows, not even a gradient of 0.
        ratio = jnp.where(held, bound, jnp.exp(jnp.where(held, 0, log_ratio)))
        return -advantage * ratio

    return reduced(loss, examples, reduction)


@reducible
def kl_estimate(
    log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    *,
    where: ArrayLike | None = None,
    kind: Kind = "k3",
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Estimate of the divergence of a policy from a reference, by tokens of the policy.

    .. math::
      k_1 = -\log r, \qquad k_2 = \tfrac{1}{2} (\log r)^2, \qquad k_3 = r - 1 - \log r,
      \qquad r = \frac{q(y)}{p(y)}

    for a token drawn from the policy p, with the reference q. The means of :math:`k_1` and
    :math:`k_3` are :math:`D(p \| q)`; the mean of :math:`k_2` is close to it if p and q are close.
    :math:`k_2` and :math:`k_3` are never negative and have less variance.

    Their gradients, for fixed tokens, have other means: 0 for :math:`k_1`, the gradient of
    :math:`D(p \| q)` for :math:`k_2`, and the gradient of :math:`D(q \| p)` for :math:`k_3`.

    Args:
      log_prob: log-probability of the token that was drawn `[...]`, in nats.
      reference_log_prob: log-probability of the same token under the reference, of the same shape.
      where: bool: the tokens that count, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      kind: "k1", "k2" or "k3".
      sample_weight: weight of each token, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the tokens that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The estimate in nats, of the shape of `log_prob` or `[]`, in float32 (float64 if either array
      is float64). :math:`k_3` is accurate also where both are close.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_prob, reference = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.5]))
      >>> for kind in ("k1", "k2", "k3"):
      ...     print(ce_jax.kl_estimate(log_prob, reference, kind=kind).round(4))
      [0.6931 0.    ]
      [0.2402 0.    ]
      [0.1931 0.    ]

    References:
      Schulman, `Approximating KL Divergence`, 2020; in a loss: Shao et al., `DeepSeekMath: Pushing
      the Limits of Mathematical Reasoning in Open Language Models`, 2024.
    """
    checks.one_of("kind", kind, get_args(Kind))
    return _kl_estimate(
        log_prob,
        reference_log_prob,
        where,
        sample_weight,
        kind=kind,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _kl_estimate(
    log_prob: Array,
    reference_log_prob: Array,
    where: Array | None,
    sample_weight: Array | None,
    *,
    kind: Kind,
    reduction: Reducer,
) -> Loss:
    arrays = {"log_prob": log_prob, "reference_log_prob": reference_log_prob}
    estimates: dict[Kind, Callable[[Array, Array], Array]] = {
        "k1": lambda ours, reference: ours - reference,
        "k2": lambda ours, reference: jnp.square(reference - ours) / 2,
        "k3": lambda ours, reference: expm1_less_x(reference - ours),
    }
    return reduced(estimates[kind], examples_of(arrays, where, sample_weight), reduction)
