r"""Losses of a policy: what a sampled token's advantage and a reference ask of its log-probability.

They take log-probabilities of tokens, as `softmax_statistics` and `linear_softmax_statistics` give
them. They are plain functions: JAX differentiates them, in any mode and order. Advantages and the
log-probabilities of the policy that drew the samples are constants as a rule: stop their gradient,
or compute them outside of the function that is differentiated.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import reductions
from ._arguments.compiled import compiled
from ._arguments.log_probs import reduced, rows_of
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
    r"""Proximal policy optimisation: the advantage times the ratio, which pays no more when far.

    .. math::
      \ell = -\min \big( r A, \; \mathrm{clip}(r, 1 - \mathrm{low}, 1 + \mathrm{high}) \, A \big),
      \qquad r = \frac{p(y)}{p_\mathrm{old}(y)}

    Where the bound holds, no gradient reaches the policy, even where r itself overflows. A ratio
    is not bounded where it makes the loss worse: above :math:`1 + \mathrm{high}` with a negative
    advantage.

    Args:
      log_prob: log-probability of the token that was drawn `[...]`, in nats.
      old_log_prob: that by the policy that drew it, of the same shape.
      advantage: A, a scalar or an array with the axes of `log_prob` (size 1 broadcasts): `[B, 1]`
        for one advantage of each sequence.
      where: bool: the tokens that count, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      low: how far below 1 the ratio pays, in [0, 1]. May be traced.
      high: how far above 1 the ratio pays, at least 0. May be traced.
      sample_weight: weight of each token, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the tokens that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `log_prob` or `[]`, in float32 (float64 if any of the first three
      arrays is).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_prob, old = jnp.log(jnp.array([0.9, 0.9])), jnp.log(jnp.array([0.6, 0.6]))
      >>> print(ce_jax.ppo_clip_loss(log_prob, old, jnp.array([1.0, -1.0])))
      [-1.2  1.5]

    References:
      Schulman et al., `Proximal Policy Optimization Algorithms`, 2017; with a bound above that
      differs: Yu et al., `DAPO: An Open-Source LLM Reinforcement Learning System at Scale`, 2025.
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
    rows = rows_of(arrays, where, sample_weight, broadcast=("advantage",))
    ours, old, advantage = rows.values
    gains, log_ratio = advantage >= 0, ours - old
    bound = jnp.where(gains, 1 + high.astype(ours.dtype), 1 - low.astype(ours.dtype))
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    held = jnp.where(gains, ratio > bound, ratio < bound)
    # An exponential that overflows must not be on the way of a gradient, not even of one that is 0.
    ratio = jnp.where(held, bound, jnp.exp(jnp.where(held, 0, log_ratio)))
    return reduced(-advantage * ratio, rows, reduction)


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
    r"""Estimate of the divergence of a policy and a reference, from tokens the policy drew.

    .. math::
      k_1 = -\log r, \qquad k_2 = \tfrac{1}{2} (\log r)^2, \qquad k_3 = r - 1 - \log r,
      \qquad r = \frac{q(y)}{p(y)}

    for a token drawn from the policy p, beside the reference q. The mean of :math:`k_1` and of
    :math:`k_3` is :math:`D(p \| q)`; :math:`k_2` is off by little where both are close. The last
    two are never negative and vary less.

    As a part of a loss their gradients are another matter, as the tokens are held constant. In
    the mean that of :math:`k_1` is 0, that of :math:`k_2` is the gradient of :math:`D(p \| q)`, and
    that of :math:`k_3` is the gradient of :math:`D(q \| p)`.

    Args:
      log_prob: log-probability of the token that was drawn `[...]`, in nats.
      reference_log_prob: that by the reference, of the same shape.
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
      is). Accurate where both are close: no digits of :math:`k_3` cancel.

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
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
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
    rows = rows_of(arrays, where, sample_weight)
    ours, reference = rows.values
    log_ratio = reference - ours
    if kind == "k1":
        return reduced(ours - reference, rows, reduction)
    if kind == "k2":
        return reduced(jnp.square(log_ratio) / 2, rows, reduction)
    return reduced(expm1_less_x(log_ratio), rows, reduction)
