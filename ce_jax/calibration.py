"""Whether a model's probabilities are right, and one number to mend them with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from ._arguments import checks, reductions, targets
from ._rows.bins import bin_counts, bin_of_rank, bin_sums, share_of_equals
from ._rows.numerics import positive_int, scalar
from ._rows.tile import wide
from .diagnostics import log_softmax

_Axis = int | tuple[int, ...] | None
_MOST_STEPS = 100
# Bracket of the inverse temperature, the inverse temperature, its last change, steps taken.
_State = tuple[Array, Array, Array, Array, Array]


class ReliabilityBins(NamedTuple):
    """Predictions grouped by their confidence; see `reliability_bins`.

    Attributes:
      size: number of predictions in each bin.
      confidence: mean probability they were made with; NaN in an empty bin.
      accuracy: share of them that is right; NaN in an empty bin.
    """

    size: Integer[Array, " bins"]
    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]


def reliability_bins(
    confidence: Shaped[ArrayLike, "..."],
    correct: Shaped[ArrayLike, "..."],
    *,
    bins: int = 15,
    adaptive: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> ReliabilityBins:
    r"""Groups predictions by confidence, to set the mean confidence against the accuracy.

    .. math::
      B_b = \{ i : (b - 1) / M < c_i \le b / M \}, \qquad
      \mathrm{conf}_b = \frac{1}{n_b} \sum_{i \in B_b} c_i, \qquad
      \mathrm{acc}_b = \frac{1}{n_b} \sum_{i \in B_b} y_i, \qquad b = 1, \ldots, M

    or, if adaptive, M groups of equal size (to within one) in the order of confidence. The border
    of two groups may fall among predictions of equal confidence. No order among them means
    anything, so each of them then counts as their mean, and the accuracy is

    .. math::
      \mathrm{acc}_b = \frac{1}{n_b} \sum_{i \in B_b} \bar y(c_i), \qquad
      \bar y(c) = \text{the share of the predictions with confidence } c \text{ that is right}

    which is the formula above wherever no tie is cut. The order in which predictions come has no
    effect on an adaptive result, and on the other none but the rounding of a sum. Plot the accuracy
    over the confidence: a calibrated model is on the diagonal.

    Args:
      confidence: probability given to what was predicted, in [0, 1], floating, of any shape.
      correct: bool, of the same shape: whether it came true.
      bins: number M of bins.
      adaptive: bins of equal size instead of equal width.
      where: bool, broadcastable to `confidence`: the predictions to include.

    Returns:
      A named tuple of arrays `[M]`: `size`, `confidence` and `accuracy`, the latter two float32
      (float64 for a float64 confidence).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a number of bins that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> confidence = jnp.array([0.75, 1.0, 0.5, 0.25])
      >>> correct = jnp.array([True, True, False, False])
      >>> print(ce_jax.reliability_bins(confidence, correct, bins=2))
      ReliabilityBins(size=Array([2, 2], dtype=int32),
                      confidence=Array([0.375, 0.875], dtype=float32),
                      accuracy=Array([0., 1.], dtype=float32))

    References:
      Guo et al., `On Calibration of Modern Neural Networks`, 2017; Nixon et al., `Measuring
      Calibration in Deep Learning`, 2019 (adaptive).
    """
    bins = positive_int("bins", bins)
    return _reliability_bins(confidence, correct, where, bins=bins, adaptive=bool(adaptive))


@functools.partial(jax.jit, static_argnames=("bins", "adaptive"), inline=True)
def _reliability_bins(
    confidence: ArrayLike,
    correct: ArrayLike,
    where: ArrayLike | None,
    *,
    bins: int,
    adaptive: bool,
) -> ReliabilityBins:
    found = _means_of_bins(confidence, correct, where, bins, adaptive)
    means = (jnp.where(found.size == 0, jnp.nan, x) for x in (found.confidence, found.accuracy))
    return ReliabilityBins(found.size, *means)


def _means_of_bins(
    confidence: ArrayLike, correct: ArrayLike, where: ArrayLike | None, bins: int, adaptive: bool
) -> ReliabilityBins:
    """As `reliability_bins`, with 0 for the means of an empty bin."""
    confidence = checks.floating("confidence", confidence)
    correct = checks.boolean("correct", correct)
    checks.shape_is("correct", correct, confidence.shape, "the shape of confidence")
    counts = jnp.ones(confidence.shape, bool)
    if where is not None:
        where = checks.boolean("where", where)
        counts = checks.broadcast("where", where, counts.shape, "the shape of confidence")
    counts, correct = counts.reshape(-1), correct.reshape(-1)
    dtype = wide(confidence.dtype)
    confidence = jnp.where(counts, confidence.reshape(-1).astype(dtype), 0)
    if adaptive:
        # By all that a prediction is: no sum can then depend on the order in which they came.
        excluded, confidence, correct = jax.lax.sort((~counts, confidence, correct), num_keys=3)
        counts = ~excluded
        rank = jax.lax.iota(jnp.int32, confidence.shape[0])
        index = bin_of_rank(rank, jnp.sum(counts, dtype=jnp.int32), bins)
    else:
        # XLA may multiply by a rounded 1 / bins, where NumPy gives the nearest number to each.
        edges = jnp.asarray(np.arange(1, bins) / bins, dtype)
        index = jnp.searchsorted(edges, confidence, side="left")
    size = bin_counts(counts, index, bins)
    divisor = jnp.maximum(size, 1).astype(dtype)

    def mean(x: Array) -> Array:
        # The rounding of a mean is as large as the sum was; what is left of it after the first is
        # not.
        def once(x: Array) -> Array:
            return bin_sums(jnp.where(counts, x, 0), index, bins) / divisor

        rough = jax.lax.stop_gradient(once(x))
        return rough + once(x - rough[index])

    if adaptive:
        accuracy = mean(share_of_equals(confidence, correct, counts))
    else:
        accuracy = bin_counts(counts & correct, index, bins).astype(dtype) / divisor
    return ReliabilityBins(size, mean(confidence), accuracy)


def expected_calibration_error(
    confidence: Shaped[ArrayLike, "..."],
    correct: Shaped[ArrayLike, "..."],
    *,
    bins: int = 15,
    adaptive: bool = False,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Mean distance of the accuracy from the confidence, over the bins of `reliability_bins`.

    .. math:: \sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    It depends on the number of bins, and small samples make it too large. It does not depend on the
    order of the predictions, those of equal confidence included.

    Args:
      confidence: probability given to what was predicted, in [0, 1], floating, of any shape.
      correct: bool, of the same shape: whether it came true.
      bins: number of bins.
      adaptive: bins of equal size instead of equal width.
      where: bool, broadcastable to `confidence`: the predictions to include.

    Returns:
      The error in [0, 1], `[]`, float32 (float64 for a float64 confidence). NaN of no prediction.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a number of bins that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> confidence, correct = jnp.array([0.75, 1.0, 0.5]), jnp.array([True, True, False])
      >>> print(ce_jax.expected_calibration_error(confidence, correct))
      0.25

    References:
      Naeini et al., `Obtaining Well Calibrated Probabilities Using Bayesian Binning`, 2015.
    """
    bins = positive_int("bins", bins)
    return _expected_calibration_error(
        confidence, correct, where, bins=bins, adaptive=bool(adaptive)
    )


# One program from the predictions on: means of empty bins, which are NaN, would leave it.
@functools.partial(jax.jit, static_argnames=("bins", "adaptive"), inline=True)
def _expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    where: ArrayLike | None,
    *,
    bins: int,
    adaptive: bool,
) -> Array:
    found = _means_of_bins(confidence, correct, where, bins, adaptive)
    gap = jnp.abs(found.accuracy - found.confidence)
    size = found.size.astype(gap.dtype)
    everything = jnp.sum(size)
    return jnp.sum(size * gap) / jnp.where(everything == 0, jnp.nan, everything)


def brier_score(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    axis: int | Sequence[int] = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    reduction: str = "none",
) -> Float[Array, "..."]:
    r"""Squared distance of softmax(logits) from the label, a score that calibration improves.

    .. math:: \sum_c \left( \mathrm{softmax}(z)_c - [c = y] \right)^2

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating; `-inf` masks a class.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of them: labels are then flat indices.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      sample_weight: weight of each example, broadcastable to the loss.
      ignore_index: label of rows that do not count.
      reduction: "none"; "sum"; or "mean", the sum over `sum(sample_weight)` of the rows that count
        (0 if that is 0).

    Returns:
      The score in [0, 2], of shape `[...]` or `[]`, in float32 (float64 for float64 logits). A
      label that is no class gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.brier_score(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0])))
      [0.375]

    References:
      Brier, `Verification of Forecasts Expressed in Terms of Probability`, 1950.
    """
    checks.reduction(reduction)
    return _brier_score(
        logits,
        labels,
        where,
        sample_weight,
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reduction,
    )


@functools.partial(jax.jit, static_argnames=("axis", "ignore_index", "reduction"), inline=True)
def _brier_score(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    *,
    axis: _Axis,
    ignore_index: int | None,
    reduction: str,
) -> Array:
    rows = targets.rows_of("logits", logits, axis, where)
    shape = rows.values.shape
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index)
    dtype = wide(rows.values.dtype)
    sample_weight = reductions.weights("sample_weight", sample_weight, shape[:-1], dtype)
    p = jnp.exp(log_softmax(targets.without_excluded(rows.values, label.counts, sample_weight)))
    score = jnp.sum(jnp.square(p - jax.nn.one_hot(label.ids, shape[-1], dtype=dtype)), -1)
    score = targets.nan_if(label.unknown, score, sample_weight)
    return reductions.reduce(score, label.counts, sample_weight, reduction)


def fit_temperature(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    axis: int | Sequence[int] = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    ignore_index: int | None = None,
    low: Shaped[ArrayLike, ""] = 0.01,
    high: Shaped[ArrayLike, ""] = 100.0,
) -> Float[Array, ""]:
    r"""The temperature by which to divide logits for the least cross-entropy on held-out data.

    .. math:: T = \arg\min_T \sum_n s_n \left( \mathrm{lse}(z_n / T) - z_{n y_n} / T \right)

    The loss is convex in :math:`1 / T`, so Newton's method with a bracket finds the one minimum in
    a few passes over the data, to the last digits, where a gradient method would need a step size
    and hundreds of them.

    Args:
      logits: logits `[..., C]` of data that the model was not trained on; `-inf` masks a class.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of them: labels are then flat indices.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      sample_weight: weight of each example, broadcastable to the loss.
      ignore_index: label of rows that do not count.
      low: the least temperature; the result where every prediction is right, and so the best
        temperature 0. May be traced.
      high: the highest temperature; the result for a model that is no better than chance, whose
        best temperature is infinite. May be traced.

    Returns:
      The temperature, `[]`, float32 (float64 for float64 logits). Where no temperature between
      `low` and `high` is the best, it is that bound itself, to the last bit (in the dtype of the
      result): `T == high` is the sign that there was no optimum to find. 1, or the bound next to
      it, if no row counts. Rows whose label is masked are left out: their loss is infinite at every
      temperature. A label that is no class and logits without a softmax give NaN. It is found in
      a loop of unknown length, so there is no reverse-mode derivative of it.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit; `low` must not be above `high`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
      >>> print(ce_jax.fit_temperature(logits, jnp.array([0, 0, 0, 1])))  # 4 / log 3
      3.641

    References:
      Guo et al., `On Calibration of Modern Neural Networks`, 2017.
    """
    least, most = scalar("low", low, low=1e-6), scalar("high", high, low=1e-6)
    known = not any(isinstance(x, jax.core.Tracer) for x in (least, most))
    if known and float(least) > float(most):
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    return _fit_temperature(
        logits,
        labels,
        where,
        sample_weight,
        least,
        most,
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
    )


@functools.partial(jax.jit, static_argnames=("axis", "ignore_index"), inline=True)
def _fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    low: Array,
    high: Array,
    *,
    axis: _Axis,
    ignore_index: int | None,
) -> Array:
    rows = targets.rows_of("logits", logits, axis, where)
    shape, dtype = rows.values.shape, wide(rows.values.dtype)
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index)
    weight = reductions.weights("sample_weight", sample_weight, shape[:-1], dtype)
    z = targets.without_excluded(rows.values, label.counts, weight).astype(dtype)
    top = jnp.max(z, -1, keepdims=True)
    z = z - jnp.where(jnp.isneginf(top), 0, top)
    allowed = z > -jnp.inf
    at_label = jnp.take_along_axis(z, label.ids[..., None], -1)
    usable = at_label[..., 0] > -jnp.inf
    if label.counts is not None:
        usable &= label.counts
    weight = jnp.where(usable, jnp.ones(shape[:-1], dtype) if weight is None else weight, 0)
    # Relative to the label's logit, which then is out of the formulas; 0 where it is masked.
    z = jnp.where(allowed, z - jnp.where(usable[..., None], at_label, 0), 0)
    informative = jnp.any((weight != 0)[..., None] & (z != 0))

    def slope_and_curvature(inverse: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(jnp.where(allowed, inverse * z, -jnp.inf), -1)
        mean = jnp.sum(p * z, -1)
        spread = jnp.sum(p * jnp.square(z - mean[..., None]), -1)
        return jnp.sum(weight * mean), jnp.sum(weight * spread)

    low, high = low.astype(dtype), high.astype(dtype)
    least, most = 1 / high, 1 / low
    (first, curvature), (last, _) = slope_and_curvature(least), slope_and_curvature(most)
    # The slope rises with 1 / T. Where it has one sign from bound to bound, a bound is the best.
    # With every prediction right it underflows to 0; so does the curvature, even at `high`.
    hottest = informative & ((first > 0) | (first == 0) & (curvature > 0))
    coldest = informative & (last <= 0)

    def step(state: _State) -> _State:
        least, most, inverse, change, steps = state
        slope, curvature = slope_and_curvature(inverse)
        least = jnp.where(slope < 0, inverse, least)
        most = jnp.where(slope > 0, inverse, most)
        newton = inverse - slope / jnp.where(curvature > 0, curvature, 1)
        inside = (curvature > 0) & (newton > least) & (newton < most)
        # Far from the optimum Newton's steps do not become shorter, and would be too many.
        shorter = jnp.abs(newton - inverse) < change / 2
        better = jnp.where(inside & shorter, newton, jnp.sqrt(least * most))
        better = jnp.where(slope == 0, inverse, better)
        return least, most, better, jnp.abs(better - inverse), steps + 1

    def unsettled(state: _State) -> Array:
        _, _, inverse, change, steps = state
        found = (change <= 4 * jnp.finfo(dtype).eps * inverse) | (steps >= _MOST_STEPS)
        return ~(found | hottest | coldest)

    start = jnp.clip(jnp.ones((), dtype), least, most)
    state = (least, most, start, jnp.asarray(jnp.inf, dtype), jnp.zeros((), jnp.int32))
    inverse = jax.lax.while_loop(unsettled, step, state)[2]
    found = jnp.clip(1 / inverse, low, high)
    found = jnp.where(coldest, low, jnp.where(hottest, high, found))
    known = weight != 0 if sample_weight is not None else jnp.ones_like(usable)
    return jnp.where(jnp.any(label.unknown & known) | jnp.isnan(first), jnp.nan, found)
