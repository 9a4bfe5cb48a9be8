r"""Softmax cross-entropy of logits held in memory.

Each function runs the same four stages: target (`_arguments.targets`), row statistics
(`_rows.dense`, which has the derivative), row loss (`_rows.loss`) and reduction
(`_arguments.reductions`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible, with_statistics
from ._rows import sharded
from ._rows.dtypes import wide
from ._rows.loss import smoothing_coefficients, softmax_loss
from ._rows.numerics import silenced
from ._rows.tempered import row_statistics
from ._rows.tile import ABSENT, Target
from .statistics import SoftmaxStatistics, by_label


@with_statistics
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    temperature: ArrayLike = 1.0,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    return_statistics: bool = False,
    forward_mode: bool = False,
) -> Loss | tuple[Loss, SoftmaxStatistics]:
    r"""Cross-entropy between softmax(logits) and class ids, in nats.

    For logits :math:`z`, label :math:`y`, class weights :math:`w` and smoothing
    :math:`\epsilon` over the :math:`K` allowed classes (those with :math:`z_c > -\infty`):

    .. math::
      \ell = (1 - \epsilon)\, w_y (\mathrm{lse}(z) - z_y)
        + \frac{\epsilon}{K} \sum_c w_c (\mathrm{lse}(z) - z_c) + \zeta\, \mathrm{lse}(z)^2,
      \qquad \mathrm{lse}(z) = \log \sum_c e^{z_c}

    With no option set the gradient is :math:`\mathrm{softmax}(z) - y`.

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating. `-inf` marks a class that is not
        allowed.
      labels: class ids `[...]`, of any integer dtype; the shape of `logits` without the class axis.
      axis: the class axis, or a tuple of class axes; labels are then flat indices into these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`). A
        row that does not count has loss 0 and gradient 0.
      weight: weight of each class `[C]`.
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts). With weight 0, loss and gradient of the row are 0, even if they would be inf or
        NaN.
      ignore_index: label of rows that do not count.
      label_smoothing: share of the target that is spread evenly over the allowed classes, in
        [0, 1]. May be traced.
      z_loss: coefficient of the squared log-normaliser, at least 0. May be traced.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the class axis is sharded.
        `logits`, `weight` and a `where` over classes hold the classes of this device. Labels are
        ids among all classes. The loss is the same on all devices of that axis.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight * weight[label])` of the rows that count (0 if that is 0, where torch
        gives NaN; see `mean_denominator`).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      return_statistics: return `(loss, statistics)` from one pass, with the statistics of
        `softmax_statistics`. The accuracy is the mean of `statistics.argmax == labels` over the
        rows that count (`jnp.mean(..., where=...)`): of others the argmax is 0. Under `jit`,
        statistics that are not used are not computed.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 logits), and the
      statistics if asked for. A label outside `[0, C)` that is not `ignore_index` makes loss and
      gradient of its row NaN. A label on a class that is not allowed gives the loss +inf.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ce_jax
      >>> logits = jnp.log(jnp.array([[0.34, 0.46, 0.20]]))
      >>> labels = jnp.array([0])
      >>> print(ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels))
      [1.0788]
      >>> loss = ce_jax.softmax_cross_entropy_with_integer_labels
      >>> print(jax.grad(lambda z: loss(z, labels, reduction="sum"))(logits))
      [[-0.66  0.46  0.2 ]]

    References:
      Bridle, `Training Stochastic Model Recognition Algorithms as Networks can Lead to Maximum
      Mutual Information Estimation of Parameters`, 1989. Smoothing: Szegedy et al.,
      `Rethinking the Inception Architecture for Computer Vision`, 2016. z-loss: Chowdhery et al.,
      `PaLM`, 2022.
    """
    return _integer_loss(
        logits,
        labels,
        where,
        weight,
        sample_weight,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        options.not_zero("z_loss", z_loss),
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        return_statistics=return_statistics,
        forward_mode=forward_mode,
    )


@compiled
def _integer_loss(
    logits: Array,
    labels: Array,
    where: Array | None,
    weight: Array | None,
    sample_weight: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    axis_name: str | None,
    reduction: Reducer,
    return_statistics: bool,
    forward_mode: bool,
) -> Loss | tuple[Loss, SoftmaxStatistics]:
    rows = targets.rows_of("logits", logits, axis, where, axis_name)
    z, dtype = rows.values, wide(rows.values.dtype)
    classes = sharded.all_classes(z.shape[-1], axis_name)
    label = targets.class_ids(labels, z.shape[:-1], classes, rows.counts, ignore_index, axis)
    weight = targets.class_weight(weight, z.shape[-1], dtype)
    sample_weight = reductions.weights(sample_weight, z.shape[:-1], dtype)
    temperature = options.row_temperature(temperature, z.shape[:-1], dtype)

    spread = ABSENT
    if label_smoothing is not None:
        spread = smoothing_coefficients(weight, classes, dtype)
    counts = targets.effective(z, label.counts, sample_weight, axis_name)
    target = Target(labels=label.ids, classes=spread)
    found = row_statistics(
        z,
        target,
        counts,
        temperature,
        statistics=return_statistics,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )

    label_weight = None
    if weight is not None:
        label_weight = sharded.take_class(weight, label.ids, axis_name)
    statistics = silenced(sample_weight, found)
    loss = softmax_loss(statistics, label_weight, label_smoothing, z_loss, classes=classes)
    loss = targets.nan_if(label.unknown, loss, sample_weight)
    loss = reductions.reduce(loss, label.counts, sample_weight, reduction, label_weight)
    return (loss, by_label(found, label)) if return_statistics else loss


@reducible
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    temperature: ArrayLike = 1.0,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Cross-entropy between softmax(logits) and target distributions, in nats.

    For logits :math:`z` and labels :math:`q`, smoothed over the :math:`K` allowed classes and
    weighted to :math:`t_c = w_c ((1 - \epsilon) q_c + \epsilon / K)`, with
    :math:`T = \sum_c t_c`:

    .. math::
      \ell = T\, \mathrm{lse}(z) - \langle t, z \rangle + \zeta\, \mathrm{lse}(z)^2,
      \qquad \mathrm{lse}(z) = \log \sum_c e^{z_c}

    The gradient is :math:`(T + 2 \zeta\, \mathrm{lse}(z))\, \mathrm{softmax}(z) - t`. The labels of
    a row need not sum to 1. Without options, their gradient is :math:`\mathrm{lse}(z) - z`.

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating. `-inf` marks a class that is not
        allowed; if such a class has a label other than 0, the loss is +inf. (optax ignores labels
        of classes that `where` excludes; `labels * where` gives the same value.)
      labels: a non-negative number for each class, floating or bool (one-hot), broadcastable to
        `logits` except in the class axis. Integers, such as counts, must have the shape of
        `logits`, so that class ids are not mistaken for distributions.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`). A
        row that does not count has loss 0 and gradient 0.
      weight: weight of each class `[C]`.
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts). With weight 0, loss and gradient of the row are 0, even if they would be inf or
        NaN.
      label_smoothing: share of the target that is spread evenly over the allowed classes, in
        [0, 1]. May be traced.
      z_loss: coefficient of the squared log-normaliser, at least 0. May be traced.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the class axis of `logits`,
        `labels` and `weight` is sharded.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0, where torch gives NaN).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules.

    Returns:
      The loss, of the shape of `logits` without the class axes or `[]`, in float32 (float64 for
      float64 logits).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits = jnp.log(jnp.array([[0.3, 0.6, 0.1]]))
      >>> print(ce_jax.softmax_cross_entropy(logits, jnp.array([[0.0, 1.0, 0.0]])))
      [0.511]

    References:
      Good, `Rational Decisions`, 1952; Szegedy et al., `Rethinking the Inception Architecture for
      Computer Vision`, 2016 (smoothing); Chowdhery et al., `PaLM`, 2022 (z-loss).
    """
    return _distribution_loss(
        logits,
        labels,
        where,
        weight,
        sample_weight,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        options.not_zero("z_loss", z_loss),
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


safe_softmax_cross_entropy = softmax_cross_entropy


@compiled
def _distribution_loss(
    logits: Array,
    labels: Array,
    where: Array | None,
    weight: Array | None,
    sample_weight: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    axis_name: str | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    rows = targets.rows_of("logits", logits, axis, where, axis_name)
    z, dtype = rows.values, wide(rows.values.dtype)
    classes = sharded.all_classes(z.shape[-1], axis_name)
    weight = targets.class_weight(weight, z.shape[-1], dtype)
    sample_weight = reductions.weights(sample_weight, z.shape[:-1], dtype)
    temperature = options.row_temperature(temperature, z.shape[:-1], dtype)
    counts = targets.effective(z, rows.counts, sample_weight, axis_name)

    # Narrow labels stay narrow: `tile` widens them as it reads them, without a wide copy. Labels
    # that are broadcast are widened here, because their cotangents add up over the rows.
    labels = checks.real("labels", labels)
    narrow = labels.dtype in (jnp.bfloat16, jnp.float16)
    as_given = weight is None and labels.shape == logits.shape
    held = labels.dtype if narrow and as_given else dtype
    probs = targets.distributions(labels, logits.shape, axis, held)
    probs = targets.without_excluded(probs, rows.counts, sample_weight, axis_name)
    if weight is not None:
        probs = probs * jnp.broadcast_to(weight, probs.shape)
    spread = ABSENT
    if label_smoothing is not None:
        spread = smoothing_coefficients(weight, classes, dtype)
    target = Target(probs=probs, classes=spread)
    found = row_statistics(
        z, target, counts, temperature, axis_name=axis_name, forward_mode=forward_mode
    )

    statistics = silenced(sample_weight, found)
    loss = softmax_loss(statistics, None, label_smoothing, z_loss, classes=classes)
    return reductions.reduce(loss, rows.counts, sample_weight, reduction)
