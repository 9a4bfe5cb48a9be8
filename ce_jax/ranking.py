"""Losses that rank the label above a sample of other classes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import checks, options, reductions
from ._arguments.compared import compared
from ._arguments.compiled import compiled
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows.numerics import silenced, tempered, weighted
from .sigmoid import sigmoid_binary_cross_entropy


@reducible
def bpr_loss(
    label_logits: ArrayLike,
    negative_logits: ArrayLike,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Bayesian personalised ranking (BPR): cross-entropy of ranking the label above negatives.

    .. math:: \ell = -\frac{1}{S} \sum_{s=1}^{S} \log \sigma(z_y - z_{k_s})

    Args:
      label_logits: score of the label `[...]`, floating.
      negative_logits: scores of the negatives `[..., S]`, floating.
      where: bool; rows to include (shape of the loss) or negatives to include (shape of
        `negative_logits`), for example those that differ from the label. A row without any negative
        does not count.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 scores).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.bpr_loss(jnp.array([2.0]), jnp.array([[0.0, 2.0, -1.0]])))
      [0.2895]

    References:
      Rendle et al., `BPR: Bayesian Personalized Ranking from Implicit Feedback`, 2009.
    """
    return _bpr(
        label_logits,
        negative_logits,
        where,
        sample_weight,
        options.temperature(temperature),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _bpr(
    label_logits: Array,
    negative_logits: Array,
    where: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    x = compared(label_logits, negative_logits, where, sample_weight)
    ahead = x.label[..., None] - x.negatives  # of quotients it would lose digits
    of_row = options.row_temperature(temperature, x.label.shape, ahead.dtype, x.counts)
    ahead = ahead if of_row is None else tempered(ahead, of_row)
    included = jnp.ones(ahead.shape, bool) if x.included is None else x.included
    losses = sigmoid_binary_cross_entropy(
        ahead, jnp.ones_like(ahead), where=included, forward_mode=forward_mode
    )
    number = jnp.sum(included, -1)
    loss = jnp.sum(losses, -1) / jnp.maximum(number, 1).astype(losses.dtype)
    counts = checks.both(x.counts, number > 0)
    return reductions.reduce(loss, counts, x.weights, reduction)


@reducible
def gbce_loss(
    label_logits: ArrayLike,
    negative_logits: ArrayLike,
    where: ArrayLike | None = None,
    *,
    num_items: int,
    calibration: Scalar = 0.75,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Binary cross-entropy, corrected for the negatives that were not drawn (gBCE).

    With S negatives, drawn uniformly from the C - 1 classes that are not the label, and the
    calibration t:

    .. math::
      \ell = -\frac{1}{S + 1} \Big( \beta \log \sigma(z_y)
        + \sum_{s=1}^{S} \log (1 - \sigma(z_{k_s})) \Big), \qquad
      \beta = 1 - t (1 - \alpha), \quad \alpha = \frac{S}{C - 1}

    With t = 0 this is the binary cross-entropy: the model then learns probabilities that are too
    high, the more so the fewer negatives there are. With t = 1 the model learns the right
    probabilities.

    Args:
      label_logits: score of the label `[...]`, floating.
      negative_logits: scores of the negatives `[..., S]`, floating.
      where: bool; rows to include (shape of the loss) or negatives to include (shape of
        `negative_logits`), for example those that differ from the label. S is the number of
        included negatives.
      num_items: C, the number of classes, at least 2.
      calibration: t, in [0, 1]. May be traced.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 scores).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> scores = jnp.array([2.0]), jnp.array([[0.0, 2.0, -1.0]])
      >>> print(ce_jax.gbce_loss(*scores, num_items=1001))
      [0.7913]

    References:
      Petrov and Macdonald, `gSASRec: Reducing Overconfidence in Sequential Recommendation Trained
      with Negative Sampling`, 2023, with the same default of `calibration`.
    """
    items = checks.positive_int("num_items", num_items)
    if items < 2:
        raise ValueError(f"num_items must be at least 2, got {num_items}")
    return _gbce(
        label_logits,
        negative_logits,
        where,
        scalar("calibration", calibration, 0.0, 1.0),
        sample_weight,
        options.temperature(temperature),
        items=items,
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _gbce(
    label_logits: Array,
    negative_logits: Array,
    where: Array | None,
    calibration: Array,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    items: int,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    x = compared(label_logits, negative_logits, where, sample_weight)
    dtype = x.label.dtype
    given = options.row_temperature(temperature, x.label.shape, dtype, x.counts)
    if given is not None:
        label, negatives = (tempered(z, given) for z in (x.label[..., None], x.negatives))
        x = x._replace(label=label[..., 0], negatives=negatives)
    number = jnp.full(x.label.shape, x.negatives.shape[-1], dtype)
    if x.included is not None:
        number = jnp.sum(x.included, -1, dtype=dtype)
    calibration = calibration.astype(dtype)
    beta = (1 - calibration) + calibration * (number / (items - 1))  # which may be nearly 0
    of_label = sigmoid_binary_cross_entropy(
        x.label, jnp.ones_like(x.label), forward_mode=forward_mode
    )
    of_label = weighted(beta, silenced(x.weights, of_label))
    of_negatives = sigmoid_binary_cross_entropy(
        x.negatives, jnp.zeros_like(x.negatives), where=x.included, forward_mode=forward_mode
    )
    loss = (of_label + jnp.sum(of_negatives, -1)) / (number + 1)
    return reductions.reduce(loss, x.counts, x.weights, reduction)
