r"""Preference losses without a reference model, of pairs of answers.

They take the mean log-probability of the tokens of each answer, for example from
`sequence_log_prob(..., mean=True)`. JAX differentiates these losses by its own rules, in any mode
and order.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import reductions
from ._arguments.compiled import compiled
from ._arguments.log_probs import examples_of, reduced
from ._arguments.options import log_probability, scalar
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows.logistic import softplus
from ._rows.numerics import quotient, signed_product


@reducible
def simpo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    where: ArrayLike | None = None,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Simple preference optimisation (SimPO): the rewards are mean log-probabilities.

    .. math:: \ell = -\log \sigma \big( \beta (w - l) - \gamma \big)

    where w and l are the mean log-probabilities of the tokens of the better and the worse answer.

    Args:
      chosen: mean log-probability of the tokens of the better answer `[...]`, in nats:
        `sequence_log_prob(..., mean=True)`.
      rejected: the same for the worse answer, of the same shape.
      where: bool: the pairs that count, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      beta: :math:`\beta`, at least 0. May be traced.
      gamma: :math:`\gamma`, the target margin, at least 0. The paper recommends values of
        :math:`\gamma / \beta`. May be traced.
      sample_weight: weight of each pair, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the pairs that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `chosen` or `[]`, in float32 (float64 if any log-probability is
      float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> chosen, rejected = jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.0])
      >>> print(ce_jax.simpo_loss(chosen, rejected))
      [0.3133 3.0486]

    References:
      Meng et al., `SimPO: Simple Preference Optimization with a Reference-Free Reward`, 2024.
    """
    return _simpo(
        chosen,
        rejected,
        where,
        scalar("beta", beta, low=0.0),
        scalar("gamma", gamma, low=0.0),
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _simpo(
    chosen: Array,
    rejected: Array,
    where: Array | None,
    beta: Array,
    gamma: Array,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    examples = examples_of({"chosen": chosen, "rejected": rejected}, where, sample_weight)

    def loss(better: Array, worse: Array) -> Array:
        x = signed_product(beta.astype(better.dtype), better - worse) - gamma.astype(better.dtype)
        return softplus(-x)

    return reduced(loss, examples, reduction)


@reducible
def orpo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Odds ratio preference optimisation (ORPO): the log odds ratio of the two answers.

    .. math::
      \ell = -\log \sigma \left( \log \frac{\mathrm{odds}(w)}{\mathrm{odds}(l)} \right), \qquad
      \mathrm{odds}(x) = \frac{e^x}{1 - e^x}

    where w and l are the mean log-probabilities of the tokens of the better and the worse answer.
    This is the odds-ratio term alone: the paper trains on `nll + weight * orpo_loss`, where nll is
    the cross-entropy of the better answer.

    Args:
      chosen: mean log-probability of the tokens of the better answer `[...]`, in nats, at most 0:
        `sequence_log_prob(..., mean=True)`.
      rejected: the same for the worse answer, of the same shape.
      where: bool: the pairs that count, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      sample_weight: weight of each pair, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the pairs that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `chosen` or `[]`, in float32 (float64 if any log-probability is
      float64). It is 0 if the better answer has probability 1, +inf if the worse answer has, and
      log 2 if both have. A log-probability between 0 and 1e-3, which rounding can produce, counts
      as 0; a larger one gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> chosen, rejected = jnp.log(jnp.array([0.5, 0.1])), jnp.log(jnp.array([0.1, 0.5]))
      >>> print(ce_jax.orpo_loss(chosen, rejected).round(4))
      [0.1054 2.3026]

    References:
      Hong et al., `ORPO: Monolithic Preference Optimization without Reference Model`, 2024.
    """
    return _orpo(
        chosen,
        rejected,
        where,
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _orpo(
    chosen: Array,
    rejected: Array,
    where: Array | None,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    examples = examples_of({"chosen": chosen, "rejected": rejected}, where, sample_weight)

    def loss(*values: Array) -> Array:
        return _log1p_odds_ratio(*map(log_probability, ("chosen", "rejected"), values))

    return reduced(loss, examples, reduction)


def _log1p_odds_ratio(better: Array, worse: Array) -> Array:
    """`log(1 + odds(worse) / odds(better))`, which is `log 2` where both are alike.

    At a log-probability of 0 odds are infinite, but a ratio below 1 has a limit. So such a ratio is
    computed without logarithms of odds.
    """
    both = (better == 0) & (worse == 0)
    better, worse = (jnp.where(both, -1, x) for x in (better, worse))
    ahead = better > worse
    high, low = jnp.where(ahead, better, -1), jnp.where(ahead, worse, -2)
    ratio = jnp.exp(low - high) * quotient(jnp.expm1(high), jnp.expm1(low))
    better, worse = (jnp.where(ahead, -1, x) for x in (better, worse))
    log_ratio = (worse - better) + (_log1mexp(better) - _log1mexp(worse))
    return jnp.where(ahead, jnp.log1p(ratio), softplus(log_ratio))


def _log1mexp(x: Array) -> Array:
    """`log(1 - e^x)` for x <= 0."""
    near = x > -0.5
    small, large = jnp.where(near, x, -1), jnp.where(near, -1, x)
    # Not negated: the slope at 0 is that from below.
    return jnp.where(near, jnp.log(0 - jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
