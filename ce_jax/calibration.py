"""Whether a model's probabilities are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, reducible
from ._rows import sharded
from ._rows.bins import bin_counts, bin_of_rank, bin_sums, share_of_equals
from ._rows.brier import squared_distance
from ._rows.dtypes import wide


class ReliabilityBins(NamedTuple):
    """Predictions grouped by their confidence; see `reliability_bins`.

    Attributes:
      size: number of predictions in each bin.
      confidence: mean confidence of these predictions; NaN in an empty bin.
      accuracy: share of these predictions that is right; NaN in an empty bin.
    """

    size: Integer[Array, " bins"]
    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]


def reliability_bins(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 15,
    adaptive: bool = False,
    where: ArrayLike | None = None,
) -> ReliabilityBins:
    r"""Groups predictions by confidence, to compare the mean confidence with the accuracy.

    .. math::
      B_b = \{ i : (b - 1) / M < c_i \le b / M \}, \qquad
      \mathrm{conf}_b = \frac{1}{n_b} \sum_{i \in B_b} c_i, \qquad
      \mathrm{acc}_b = \frac{1}{n_b} \sum_{i \in B_b} y_i, \qquad b = 1, \ldots, M

    or, if adaptive, M groups of equal size (to within one) in the order of confidence. The border
    of two groups may cut a tie, that is, a set of predictions of equal confidence. Each prediction
    of a tie then counts as the mean of the tie, and the accuracy is

    .. math::
      \mathrm{acc}_b = \frac{1}{n_b} \sum_{i \in B_b} \bar y(c_i), \qquad
      \bar y(c) = \text{the share of the predictions with confidence } c \text{ that is right}

    Where no tie is cut, this is the formula above. The order of the predictions has no effect on
    the adaptive result; without `adaptive` it can only change the rounding of a sum. In a plot of
    accuracy against confidence, a calibrated model is on the diagonal.

    Args:
      confidence: probability that the model gave to its prediction, in [0, 1], floating, of any
        shape.
      correct: bool, of the same shape: whether the prediction was right.
      bins: number M of bins.
      adaptive: bins of equal size instead of equal width.
      where: bool, a scalar or an array with the axes of `confidence` (size 1 broadcasts): the
        predictions to include.

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
    bins = checks.positive_int("bins", bins)
    return _reliability_bins(confidence, correct, where, bins=bins, adaptive=adaptive)


@compiled
def _reliability_bins(
    confidence: Array,
    correct: Array,
    where: Array | None,
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
    counts = checks.included(where, confidence.shape, "confidence")
    counts, confidence, correct = map(sharded.whole, (counts, confidence, correct))
    counts, correct = counts.reshape(-1), correct.reshape(-1)
    dtype = wide(confidence.dtype)
    confidence = jnp.where(counts, confidence.reshape(-1).astype(dtype), 0)
    if adaptive:
        # After sorting, the sums do not depend on the order of the predictions, not even by
        # rounding: right predictions are counted, and all of a tie get the same share.
        excluded, confidence, correct = jax.lax.sort((~counts, confidence, correct), num_keys=2)
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
        # The rounding error of a mean grows with the size of the sum. A second pass over the
        # remainders, whose sum is small, corrects it.
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
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 15,
    adaptive: bool = False,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    r"""Mean distance between accuracy and confidence, over the bins of `reliability_bins`.

    .. math:: \sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    The error depends on the number of bins, and it is too large for small samples. It does not
    depend on the order of the predictions.

    Args:
      confidence: probability that the model gave to its prediction, in [0, 1], floating, of any
        shape.
      correct: bool, of the same shape: whether the prediction was right.
      bins: number of bins.
      adaptive: bins of equal size instead of equal width.
      where: bool, a scalar or an array with the axes of `confidence` (size 1 broadcasts): the
        predictions to include.

    Returns:
      The error in [0, 1], `[]`, float32 (float64 for a float64 confidence). NaN if there is no
      prediction.

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
    bins = checks.positive_int("bins", bins)
    return _expected_calibration_error(confidence, correct, where, bins=bins, adaptive=adaptive)


# Not from the result of `reliability_bins`, in which means of empty bins are NaN.
@compiled
def _expected_calibration_error(
    confidence: Array, correct: Array, where: Array | None, *, bins: int, adaptive: bool
) -> Array:
    found = _means_of_bins(confidence, correct, where, bins, adaptive)
    gap = jnp.abs(found.accuracy - found.confidence)
    size = found.size.astype(gap.dtype)
    everything = jnp.sum(size)
    return jnp.sum(size * gap) / jnp.where(everything == 0, jnp.nan, everything)


@reducible
def brier_score(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Squared distance between softmax(logits) and the one-hot label, in [0, 2].

    .. math:: \sum_c \left( \mathrm{softmax}(z)_c - [c = y] \right)^2

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating; `-inf` masks a class.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of class axes; labels are then flat indices into these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      ignore_index: label of rows that do not count.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The score in [0, 2], of shape `[...]` or `[]`, in float32 (float64 for float64 logits). A
      label that is not a class gives NaN.

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
    return _brier_score(
        logits,
        labels,
        where,
        sample_weight,
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _brier_score(
    logits: Array,
    labels: Array,
    where: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    reduction: Reducer,
) -> Loss:
    rows = targets.rows_of("logits", logits, axis, where)
    shape = rows.values.shape
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index, axis)
    dtype = wide(rows.values.dtype)
    sample_weight = reductions.weights(sample_weight, shape[:-1], dtype)
    z = targets.without_excluded(rows.values, label.counts, sample_weight).astype(dtype)
    z = options.tempered_logits(z, temperature, label.counts)
    score = squared_distance(z, label.ids)
    score = targets.nan_if(label.unknown, score, sample_weight)
    return reductions.reduce(score, label.counts, sample_weight, reduction)
