"""Cross-entropy corrected for label noise with a known transition matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, reducible
from ._rows import sharded
from ._rows.dtypes import wide
from ._rows.tile import row_maxima
from .softmax import softmax_cross_entropy


@reducible
def forward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    transition: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Cross-entropy between noisy class ids and softmax(logits) with the same noise.

    With the transition matrix :math:`T_{cy} = P(\text{label } y \mid \text{true class } c)`:

    .. math:: \ell = -\log \sum_c T_{cy}\, \mathrm{softmax}(z)_c

    The minimum is at the distribution of the true class, although the labels are noisy. If T is the
    identity, this is the cross-entropy. JAX differentiates it by its own rules, also with respect
    to T.

    Args:
      logits: unnormalised log-probabilities of the true class `[..., C]`, floating.
      labels: noisy class ids `[...]`, of any integer dtype.
      transition: T `[C, C]`; rows sum to 1.
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
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 logits). A label that is
      not a class makes its row NaN. A label that T makes impossible for all allowed classes gives
      +inf.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> transition = jnp.array([[0.8, 0.2], [0.4, 0.6]])
      >>> logits = jnp.array([[0.0, -jnp.inf], [0.0, 0.0]])
      >>> print(ce_jax.forward_corrected_cross_entropy(logits, jnp.array([1, 1]), transition))
      [1.6094 0.9163]

    References:
      Patrini et al., `Making Deep Neural Networks Robust to Label Noise: a Loss Correction
      Approach`, 2017.
    """
    return _forward(
        logits,
        labels,
        _known_rows(transition),
        where,
        sample_weight,
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
def _forward(
    logits: Array,
    labels: Array,
    transition: Array,
    where: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    reduction: Reducer,
) -> Loss:
    rows = targets.rows_of("logits", logits, axis, where)
    shape, dtype = rows.values.shape, wide(rows.values.dtype)
    matrix = _transition(transition, shape[-1], dtype)
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index, axis)
    sample_weight = reductions.weights(sample_weight, shape[:-1], dtype)
    z = targets.without_excluded(rows.values, label.counts, sample_weight).astype(dtype)
    z = options.tempered_logits(z, temperature, label.counts)
    into_label = sharded.take_rows(matrix.T, label.ids)

    log_into = jnp.where(
        into_label > 0, jnp.log(jnp.where(into_label > 0, into_label, 1)), -jnp.inf
    )
    # Constants, as they cancel.
    top, joint_top = (row_maxima(x)[..., None] for x in (z, z + log_into))
    exp = jnp.exp(z - top)
    # A class with transition probability 0 may exceed the maximum of the others. It adds nothing,
    # but the derivative with respect to this probability is its exponential: keep it finite.
    highest = math.log(float(jnp.finfo(dtype).max) / 4) - math.log(shape[-1])
    joint = jnp.exp(jnp.where(z - joint_top > highest, highest, z - joint_top))
    possible = jnp.sum(into_label * joint, -1)
    # Where the loss is infinite, its gradient is that of the normaliser alone.
    impossible = possible == 0
    log_possible = jnp.where(impossible, -jnp.inf, jnp.log(jnp.where(impossible, 1, possible)))
    loss = (top - joint_top)[..., 0] + jnp.log(jnp.sum(exp, -1)) - log_possible
    loss = targets.nan_if(label.unknown, loss, sample_weight)
    return reductions.reduce(loss, label.counts, sample_weight, reduction)


@reducible
def backward_corrected_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    transition: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Cross-entropy whose mean over the label noise is the cross-entropy of the true class.

    With the transition matrix :math:`T_{cy} = P(\text{label } y \mid \text{true class } c)`:

    .. math::
      \ell = -\sum_c (T^{-1})_{yc} \log \mathrm{softmax}(z)_c,
      \qquad \sum_y T_{cy}\, \ell_y = -\log \mathrm{softmax}(z)_c

    The loss is unbiased, but some terms are negative, so it has no lower bound. It is unstable if T
    is far from the identity, and not finite if T is singular.

    Args:
      logits: unnormalised log-probabilities of the true class `[..., C]`, floating.
      labels: noisy class ids `[...]`, of any integer dtype.
      transition: T `[C, C]`; rows sum to 1.
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
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 logits). A label that is
      not a class makes its row NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> transition = jnp.array([[0.75, 0.25], [0.25, 0.75]])
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]]))
      >>> labels = jnp.array([0, 1])
      >>> loss = ce_jax.backward_corrected_cross_entropy(logits, labels, transition)
      >>> print(loss[0], loss[1])
      -0.9933 3.4012

    References:
      Patrini et al., `Making Deep Neural Networks Robust to Label Noise: a Loss Correction
      Approach`, 2017.
    """
    return _backward(
        logits,
        labels,
        _known_rows(transition),
        where,
        sample_weight,
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _backward(
    logits: Array,
    labels: Array,
    transition: Array,
    where: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    rows = targets.rows_of("logits", logits, axis, where)
    shape, dtype = rows.values.shape, wide(rows.values.dtype)
    matrix = _transition(transition, shape[-1], dtype)
    label = targets.class_ids(labels, shape[:-1], shape[-1], rows.counts, ignore_index, axis)
    sample_weight = reductions.weights(sample_weight, shape[:-1], dtype)
    z = targets.without_excluded(rows.values, label.counts, sample_weight)
    temperature = options.row_temperature(temperature, shape[:-1], dtype, label.counts)
    corrected = sharded.take_rows(jnp.linalg.inv(matrix), label.ids)
    loss = softmax_cross_entropy(
        z,
        sharded.with_sharding_of(corrected, z),
        temperature=1.0 if temperature is None else temperature,
        forward_mode=forward_mode,
    )
    loss = targets.nan_if(label.unknown, loss, sample_weight)
    return reductions.reduce(loss, label.counts, sample_weight, reduction)


def _known_rows(transition: ArrayLike) -> ArrayLike:
    """The matrix; raises if it is known and a row does not sum to 1, as rows of counts do not."""
    matrix = checks.floating("transition", transition)
    known = options.known_value("transition", transition)
    if known is not None:
        sums = np.sum(known.astype(np.float64), -1)
        if not np.allclose(sums, 1, atol=1e-2):
            raise ValueError(
                f"rows of transition must sum to 1, got sums of {sums}; divide counts by their sums"
            )
    return matrix


def _transition(
    transition: ArrayLike, classes: int, dtype: jnp.dtype
) -> Float[Array, "classes classes"]:
    matrix = checks.floating("transition", transition)
    checks.shape_is("transition", matrix, (classes, classes), "true class by label")
    return sharded.whole(matrix.astype(dtype))
