"""Temperature scaling: calibration of a model by one number."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.options import known_value, scalar
from ._arguments.types import ArrayLike, Axes, Scalar
from ._rows.dtypes import wide
from ._rows.numerics import relative
from ._rows.picked import label_logit

_MOST_STEPS = 100
# Bracket of the inverse temperature, the inverse temperature, its last change, steps taken.
_State = tuple[Array, Array, Array, Array, Array]


def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    low: Scalar = 0.01,
    high: Scalar = 100.0,
) -> Float[Array, ""]:
    r"""The temperature with the smallest cross-entropy on held-out data.

    .. math:: T = \arg\min_T \sum_n s_n \left( \mathrm{lse}(z_n / T) - z_{n y_n} / T \right)

    The loss is convex in :math:`1 / T`. Newton's method with a bracket finds the only minimum in a
    few passes over the data, to the last digits.

    Args:
      logits: logits `[..., C]` of data that the model was not trained on; `-inf` masks a class.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of class axes; labels are then flat indices into these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      ignore_index: label of rows that do not count.
      low: the lowest temperature. It is the result if every prediction is right, because the best
        temperature is then 0. May be traced.
      high: the highest temperature. It is the result for a model that is no better than chance,
        because its best temperature is infinite. May be traced.

    Returns:
      The temperature, `[]`, float32 (float64 for float64 logits). If the best temperature is not
      between `low` and `high`, the result is exactly the nearer bound (in the dtype of the result).
      If no row counts, the result is 1, or the bound nearest to 1. Rows whose label is masked are
      left out, because their loss is infinite at every temperature. A label that is not a class and
      logits without a softmax give NaN. The result has no reverse-mode derivative, because the
      number of steps is not known in advance.

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
    cold, hot = known_value("low", low), known_value("high", high)
    if cold is not None and hot is not None and cold > hot:
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


@compiled
def _fit_temperature(
    logits: Array,
    labels: Array,
    where: Array | None,
    sample_weight: Array | None,
    low: Array,
    high: Array,
    *,
    axis: Axes,
    ignore_index: int | None,
) -> Array:
    rows = targets.rows_of("logits", logits, axis, where)
    shape, dtype = rows.values.shape, wide(rows.values.dtype)
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index, axis)
    weight = reductions.weights(sample_weight, shape[:-1], dtype)
    z = relative(targets.without_excluded(rows.values, label.counts, weight).astype(dtype))
    allowed = z > -jnp.inf
    at_label = label_logit(z, label.ids)
    usable = checks.both(label.counts, at_label > -jnp.inf)
    unknown = label.unknown if weight is None else label.unknown & (weight != 0)
    weight = jnp.where(usable, jnp.ones(shape[:-1], dtype) if weight is None else weight, 0)
    # Relative to the label's logit, which the formulas then do not need; 0 if it is masked.
    z = jnp.where(allowed, z - jnp.where(usable, at_label, 0)[..., None], 0)
    informative = jnp.any((weight != 0)[..., None] & (z != 0))

    def slope_and_curvature(inverse: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(jnp.where(allowed, inverse * z, -jnp.inf), -1)
        mean = jnp.sum(p * z, -1)
        spread = jnp.sum(p * jnp.square(z - mean[..., None]), -1)
        return jnp.sum(weight * mean), jnp.sum(weight * spread)

    low, high = low.astype(dtype), high.astype(dtype)
    least, most = 1 / high, 1 / low
    (first, curvature), (last, _) = slope_and_curvature(least), slope_and_curvature(most)
    # The slope rises with 1 / T. If it has the same sign at both bounds, a bound is the best. If
    # every prediction is right, the slope underflows to 0; so does the curvature, even at `high`.
    hottest = informative & ((first > 0) | (first == 0) & (curvature > 0))
    coldest = informative & (last <= 0)

    def step(state: _State) -> _State:
        least, most, inverse, change, steps = state
        slope, curvature = slope_and_curvature(inverse)
        least = jnp.where(slope < 0, inverse, least)
        most = jnp.where(slope > 0, inverse, most)
        newton = inverse - slope / jnp.where(curvature > 0, curvature, 1)
        inside = (curvature > 0) & (newton > least) & (newton < most)
        # Far from the optimum, Newton's steps do not become shorter: too many would be needed.
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
    return jnp.where(jnp.any(unknown) | jnp.isnan(first), jnp.nan, found)
