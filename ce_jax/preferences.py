r"""Preference losses with a reference model: of pairs of answers, or of single answers.

They take the log-probability of each answer, for example from `sequence_log_prob`. Those of the
reference model come from a pass without gradient. JAX differentiates these losses by its own rules,
in any mode and order. No gradient is stopped unless the docstring says so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, reductions
from ._arguments.compiled import compiled
from ._arguments.log_probs import examples_of, reduced
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import sharded
from ._rows.logistic import probabilities, softplus
from ._rows.numerics import signed_product, weighted

_ANSWERS = "chosen", "rejected", "reference_chosen", "reference_rejected"


@reducible
def dpo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    where: ArrayLike | None = None,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Direct preference optimisation (DPO): binary cross-entropy of the difference of rewards.

    The reward of an answer is its log-probability minus its log-probability under the reference
    model:

    .. math::
      \ell = -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h), \qquad
      h = \log \frac{p(y_w)}{p_\mathrm{ref}(y_w)} - \log \frac{p(y_l)}{p_\mathrm{ref}(y_l)}

    Args:
      chosen: log-probability of the better answer `[...]`, in nats, summed over its tokens.
      rejected: log-probability of the worse answer, of the same shape.
      reference_chosen: log-probability of the better answer under the reference model, of the same
        shape.
      reference_rejected: log-probability of the worse answer under the reference model, of the same
        shape.
      where: bool: the pairs that count, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      beta: :math:`\beta`, coefficient of the difference of rewards h, at least 0. May be traced.
      label_smoothing: :math:`\epsilon`, in [0, 1]: the assumed share of pairs whose answers are
        exchanged by mistake. May be traced.
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
      >>> chosen, rejected = jnp.array([-10.0, -20.0]), jnp.array([-14.0, -15.0])
      >>> reference = jnp.array([-12.0, -12.0])
      >>> print(ce_jax.dpo_loss(chosen, rejected, reference, reference, beta=0.5))
      [0.1269 2.5789]

    References:
      Rafailov et al., `Direct Preference Optimization: Your Language Model is Secretly a Reward
      Model`, 2023; with smoothing: Mitchell, `A note on DPO with noisy preferences and
      relationship to IPO`, 2023.
    """
    return _dpo(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        where,
        scalar("beta", beta, low=0.0),
        scalar("label_smoothing", label_smoothing, 0.0, 1.0),
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _dpo(
    chosen: Array,
    rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
    where: Array | None,
    beta: Array,
    label_smoothing: Array,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    answers = chosen, rejected, reference_chosen, reference_rejected
    examples = examples_of(dict(zip(_ANSWERS, answers, strict=True)), where, sample_weight)

    def loss(*values: Array) -> Array:
        margin = _margin(*values)
        factor, eps = (x.astype(margin.dtype) for x in (beta, label_smoothing))
        x = signed_product(factor, margin)
        return weighted(1 - eps, softplus(-x)) + weighted(eps, softplus(x))

    return reduced(loss, examples, reduction)


@reducible
def ipo_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    where: ArrayLike | None = None,
    beta: Scalar = 0.1,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Identity preference optimisation (IPO): squared distance of the margin from a target.

    .. math::
      \ell = \left( h - \frac{1}{2 \beta} \right)^2, \qquad
      h = \log \frac{p(y_w)}{p_\mathrm{ref}(y_w)} - \log \frac{p(y_l)}{p_\mathrm{ref}(y_l)}

    Args:
      chosen: log-probability of the better answer `[...]`, in nats. The paper uses the sum over the
        tokens; TRL uses the mean, for this loss only.
      rejected: log-probability of the worse answer, of the same shape.
      reference_chosen: log-probability of the better answer under the reference model, of the same
        shape.
      reference_rejected: log-probability of the worse answer under the reference model, of the same
        shape.
      where: bool: the pairs that count, a scalar or an array with the axes of `chosen` (size 1
        broadcasts).
      beta: :math:`\beta`, at least 1e-6 (:math:`\tau` in the paper). May be traced.
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
      >>> chosen, rejected = jnp.array([-10.0, -20.0]), jnp.array([-14.0, -15.0])
      >>> reference = jnp.array([-12.0, -12.0])
      >>> print(ce_jax.ipo_loss(chosen, rejected, reference, reference, beta=0.5))
      [ 9. 36.]

    References:
      Azar et al., `A General Theoretical Paradigm to Understand Learning from Human Preferences`,
      2023.
    """
    return _ipo(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        where,
        scalar("beta", beta, low=1e-6),
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _ipo(
    chosen: Array,
    rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
    where: Array | None,
    beta: Array,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    answers = chosen, rejected, reference_chosen, reference_rejected
    examples = examples_of(dict(zip(_ANSWERS, answers, strict=True)), where, sample_weight)

    def loss(*values: Array) -> Array:
        margin = _margin(*values)
        return jnp.square(margin - 0.5 / beta.astype(margin.dtype))

    return reduced(loss, examples, reduction)


@reducible
def kto_loss(
    log_prob: ArrayLike,
    reference_log_prob: ArrayLike,
    desirable: ArrayLike,
    kl: ArrayLike,
    *,
    where: ArrayLike | None = None,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Kahneman-Tversky optimisation (KTO): single answers, each labelled good or bad.

    .. math::
      \ell = \begin{cases}
        \lambda_D \big( 1 - \sigma(\beta (r - z)) \big) & \text{desirable} \\
        \lambda_U \big( 1 - \sigma(\beta (z - r)) \big) & \text{undesirable}
      \end{cases}, \qquad r = \log \frac{p(y)}{p_\mathrm{ref}(y)}, \quad z = \max(\mathrm{kl}, 0)

    Args:
      log_prob: log-probability of the answer `[...]`, in nats, summed over its tokens.
      reference_log_prob: log-probability of the answer under the reference model, of the same
        shape.
      desirable: bool, of the same shape: whether the answer is a good one.
      kl: estimate of the divergence of the policy from the reference, in nats, a scalar or an array
        with the axes of `log_prob` (size 1 broadcasts): the mean of r over answers that belong to
        other prompts. As in the paper and in TRL, a negative value counts as 0, and its gradient is
        stopped.
      where: bool: the answers that count, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      beta: :math:`\beta`, at least 0. May be traced.
      desirable_weight: :math:`\lambda_D`, at least 0. May be traced.
      undesirable_weight: :math:`\lambda_U`, at least 0. May be traced.
      sample_weight: weight of each answer, a scalar or an array with the axes of `log_prob` (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the answers that count (0 if that is 0): as in TRL, the denominator
        does not contain the two weights.
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `log_prob` or `[]`, in float32 (float64 if any of the three floating
      arrays is float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_prob, reference = jnp.array([-10.0, -14.0]), jnp.array([-12.0, -12.0])
      >>> print(ce_jax.kto_loss(log_prob, reference, jnp.array([True, False]), 1.0, beta=0.5))
      [0.3775 0.1824]

    References:
      Ethayarajh et al., `KTO: Model Alignment as Prospect Theoretic Optimization`, 2024.
    """
    return _kto(
        log_prob,
        reference_log_prob,
        desirable,
        kl,
        where,
        scalar("beta", beta, low=0.0),
        scalar("desirable_weight", desirable_weight, low=0.0),
        scalar("undesirable_weight", undesirable_weight, low=0.0),
        sample_weight,
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _kto(
    log_prob: Array,
    reference_log_prob: Array,
    desirable: Array,
    kl: Array,
    where: Array | None,
    beta: Array,
    desirable_weight: Array,
    undesirable_weight: Array,
    sample_weight: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    arrays = {"log_prob": log_prob, "reference_log_prob": reference_log_prob, "kl": kl}
    examples = examples_of(arrays, where, sample_weight, broadcast=("kl",))
    shape, dtype = examples.values[0].shape, examples.values[0].dtype
    desirable = checks.boolean("desirable", desirable)
    checks.shape_is("desirable", desirable, shape, "the shape of log_prob")
    desirable = sharded.with_sharding_of(desirable, examples.values[0])
    good, bad, beta = (x.astype(dtype) for x in (desirable_weight, undesirable_weight, beta))

    def loss(ours: Array, reference: Array, kl: Array) -> Array:
        margin = ours - reference - jax.lax.stop_gradient(jnp.maximum(kl, 0))
        ahead = signed_product(beta, margin)
        wrong, _ = probabilities(jnp.where(desirable, -ahead, ahead))
        return jnp.where(desirable, good, bad) * wrong

    return reduced(loss, examples, reduction)


def _margin(
    chosen: Array, rejected: Array, reference_chosen: Array, reference_rejected: Array
) -> Float[Array, "*rows"]:
    """Policy and reference are close, and so their difference keeps its digits; answers are not."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)
