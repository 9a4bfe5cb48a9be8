"""Cross-entropy of given probabilities or log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from . import _platform
from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled, recomputed
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import sharded
from ._rows.dtypes import wide
from ._rows.loss import smoothing_coefficients, softmax_loss
from ._rows.numerics import log_complement, silenced, weighted
from ._rows.picked import is_label, label_logit
from ._rows.tile import RowStatistics


@reducible
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: Scalar = 0.0,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Negative log-likelihood of class ids under given log-probabilities, in nats.

    For log-probabilities :math:`l`, label :math:`y`, class weights :math:`w` and smoothing
    :math:`\epsilon` over the :math:`K` classes with :math:`l_c > -\infty`:

    .. math::
      \ell = -(1 - \epsilon)\, w_y l_y - \frac{\epsilon}{K} \sum_c w_c l_c

    The log-probabilities are not normalised here. For the output of `jax.nn.log_softmax`, this loss
    equals `softmax_cross_entropy_with_integer_labels`.

    Args:
      log_probs: log-probabilities `[..., C]`, floating.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of class axes; labels are then flat indices into these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `log_probs`).
      weight: weight of each class `[C]`.
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      ignore_index: label of rows that do not count.
      label_smoothing: share of the target that is spread evenly over the allowed classes, in [0,
        1]. May be traced.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight * weight[label])` of the rows that count (0 if that is 0, where torch
        gives NaN).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 log-probabilities). A
      label outside `[0, C)` that is not `ignore_index` gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_probs = jnp.log(jnp.array([[0.1, 0.8, 0.1]]))
      >>> print(ce_jax.nll_loss(log_probs, jnp.array([1])))
      [0.223]

    References:
      Bishop, `Pattern Recognition and Machine Learning`, 2006, section 4.3.4.
    """
    return _nll_loss(
        log_probs,
        labels,
        where,
        weight,
        sample_weight,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _nll_loss(
    log_probs: Array,
    labels: Array,
    where: Array | None,
    weight: Array | None,
    sample_weight: Array | None,
    label_smoothing: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    reduction: Reducer,
) -> Loss:
    rows = targets.rows_of("log_probs", log_probs, axis, where)
    classes, dtype = rows.values.shape[-1], wide(rows.values.dtype)
    label = targets.class_ids(
        labels, rows.values.shape[:-1], classes, rows.counts, ignore_index, axis
    )
    weight = targets.class_weight(weight, classes, dtype)
    sample_weight = reductions.weights(sample_weight, label.ids.shape, dtype)

    log_p = targets.without_excluded(rows.values, label.counts, sample_weight)
    if label_smoothing is not None:  # so that the slopes of both parts add up in it
        log_p = log_p.astype(dtype)
    cross = -_of_label(log_p, label.ids)
    statistics = RowStatistics(lse=jnp.zeros_like(cross), cross=cross)
    if label_smoothing is not None:
        allowed = log_p != -jnp.inf  # so is NaN, which is to be seen
        spread = smoothing_coefficients(weight, classes, dtype)
        terms = jnp.broadcast_to(spread, log_p.shape) * jnp.where(allowed, log_p, 0)
        uniform, count = _platform.two_sums(-terms, allowed.astype(dtype))
        statistics = statistics._replace(uniform=uniform, uniform_count=count)
    label_weight = None if weight is None else sharded.take_rows(weight, label.ids)
    statistics = silenced(sample_weight, statistics)
    loss = softmax_loss(statistics, label_weight, label_smoothing, classes=classes)
    loss = targets.nan_if(label.unknown, loss, sample_weight)
    return reductions.reduce(loss, label.counts, sample_weight, reduction, label_weight)


@jax.custom_jvp
def _of_label(
    log_p: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The label's entry. Its gradient is no scatter, which would be done in the loss's dtype."""
    return label_logit(log_p, labels)


@_of_label.defjvp
def _of_label_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (log_p, labels), (d_log_p, _) = primals, tangents
    alone = jnp.where(is_label(labels, log_p), d_log_p, 0)
    # In its own dtype, where `jnp.sum` would add up in another.
    of_label = jax.lax.reduce_sum(alone, (alone.ndim - 1,))
    return _of_label(log_p, labels), of_label.astype(wide(log_p.dtype))


@reducible
def binary_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    label_smoothing: Scalar = 0.0,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Cross-entropy between probabilities and binary labels, element by element, in nats.

    For probabilities :math:`p`, labels :math:`q` smoothed to
    :math:`y = (1 - \epsilon) q + \epsilon / 2` and weights :math:`w`:

    .. math::
      \ell = -w \left( y \log p + (1 - y) \log(1 - p) \right)

    Each logarithm is at least -100, as in torch. A logarithm that is replaced by -100 has
    derivative 0 (torch instead divides by `max(p (1 - p), 1e-12)`). If you have logits, use
    `sigmoid_binary_cross_entropy`, which is more accurate.

    Args:
      probs: numbers in [0, 1], floating, of any shape. Outside that range loss and gradient are
        NaN.
      labels: numbers in [0, 1], of any real dtype; broadcastable to `probs`.
      weight: weight of each element, broadcastable to the loss.
      sample_weight: weight of each element, a scalar or an array with the axes of the loss (size 1
        broadcasts). The mean divides by their sum.
      where: bool, a scalar or an array with the axes of the loss (size 1 broadcasts): elements to
        include.
      label_smoothing: share of the label that is spread evenly over both classes, in [0, 1]. May be
        traced.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the elements that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `probs` or `[]`, in float32 (float64 for float64 probabilities).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> probs, labels = jnp.array([0.1, 0.7, 0.8]), jnp.array([0, 1, 1])
      >>> print(ce_jax.binary_cross_entropy(probs, labels, reduction="sum"))
      0.685

    References:
      Good, `Rational Decisions`, 1952.
    """
    return _binary_cross_entropy(
        probs,
        labels,
        weight,
        sample_weight,
        where,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
@recomputed
def _binary_cross_entropy(
    probs: Array,
    labels: Array,
    weight: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    label_smoothing: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    p, y, counts, sample_weight = targets.elements(
        "probs", probs, labels, where, label_smoothing, sample_weight
    )
    p = p.astype(y.dtype)
    weight = reductions.element_weights("weight", weight, p.shape, p.dtype)
    impossible = ~((p >= 0) & (p <= 1))
    for given in (weight, sample_weight):
        if given is not None:  # 0 times NaN would be NaN
            silent = impossible & (given == 0)
            p, impossible = jnp.where(silent, 0.5, p), impossible & ~silent
    p = p * jnp.where(impossible, jnp.nan, 1)  # as a factor, so that the gradient is NaN too
    certain = p == 1
    log_complement_p = jnp.where(certain, -100, log_complement(jnp.where(certain, 0, p)))
    loss = -(y * _clamped_log(p) + (1 - y) * log_complement_p)
    if weight is not None:
        loss = weighted(weight, loss)
    return reductions.reduce(loss, counts, sample_weight, reduction)


def _clamped_log(p: Float[Array, "..."]) -> Float[Array, "..."]:
    held = p <= math.exp(-100)
    return jnp.where(held, -100, jnp.log(jnp.where(held, 1, p)))
