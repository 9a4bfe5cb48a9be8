"""Losses over the label and a sample of the other classes, for very many classes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from ._arguments import checks, options, reductions, targets
from ._arguments.compared import Compared, compared
from ._arguments.compiled import compiled
from ._arguments.layer import head_of
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows.dtypes import wide
from ._rows.sampled import layer_logits
from .negatives import Negatives
from .softmax import softmax_cross_entropy_with_integer_labels


@reducible
def sampled_softmax_cross_entropy(
    label_logits: ArrayLike,
    negative_logits: ArrayLike,
    where: ArrayLike | None = None,
    *,
    log_expected_count: ArrayLike | None = None,
    label_log_expected_count: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Softmax cross-entropy whose normaliser is estimated from the label and a sample.

    With expected counts :math:`m_k` of the classes that were drawn:

    .. math::
      \ell = \log \hat Z - z_y, \qquad
      \hat Z = e^{z_y} + \sum_{s: k_s \ne y} \frac{e^{z_{k_s}}}{m_{k_s}}

    The expectation of :math:`\hat Z` is the sum over all classes, if classes are drawn with
    replacement and `where` excludes negatives that equal the label. (The loss is a logarithm of
    :math:`\hat Z`, so it is too small on average; the error decreases with the number of
    negatives.)

    Args:
      label_logits: logit of the label `[...]`, floating.
      negative_logits: logits of the negatives `[..., S]`, floating.
      where: bool; rows to include (shape of the loss) or negatives to include (shape of
        `negative_logits`). A row without any negative has loss 0.
      log_expected_count: :math:`\log m` of the negatives, broadcastable to `negative_logits`. None
        means 0, no correction.
      label_log_expected_count: :math:`\log m` of the label, subtracted from its logit; a scalar or
        an array with the axes of `label_logits` (size 1 broadcasts). Yi et al. and TensorFlow do
        this. :math:`\hat Z` then has another expectation.
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
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 logits).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits = jnp.array([1.0, -2.0, 0.5, 3.0])
      >>> loss = ce_jax.sampled_softmax_cross_entropy(logits[0], logits[1:])
      >>> print(loss)  # all classes, each of them once
      2.2023

    References:
      Bengio and Senécal, `Quick Training of Probabilistic Neural Nets by Importance Sampling`,
      2003; Jean et al., `On Using Very Large Target Vocabulary for Neural Machine Translation`,
      2015; Yi et al., `Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
      Recommendations`, 2019.
    """
    return _sampled_softmax(
        label_logits,
        negative_logits,
        where,
        log_expected_count,
        label_log_expected_count,
        sample_weight,
        options.temperature(temperature),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _sampled_softmax(
    label_logits: Array,
    negative_logits: Array,
    where: Array | None,
    log_expected_count: Array | None,
    label_log_expected_count: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    return _loss(
        compared(label_logits, negative_logits, where, sample_weight),
        log_expected_count,
        label_log_expected_count,
        temperature,
        reduction,
        forward_mode,
    )


@reducible
def linear_sampled_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    negatives: Negatives,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    logit_soft_cap: Scalar | None = None,
    label_log_expected_count: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Sampled softmax cross-entropy of a linear layer, which reads the drawn classes only.

    .. math::
      \ell = \log \Big( e^{z_y} + \sum_{s: k_s \ne y} \frac{e^{z_{k_s}}}{m_{k_s}} \Big) - z_y,
      \qquad z_k = \mathrm{cap} \tanh\!\left(\frac{h w_k + b_k}{\mathrm{cap}}\right)

    This is `sampled_softmax_cross_entropy` of the logits of `linear_softmax_cross_entropy`.
    Negatives that equal the row's label are left out. The gradient of the kernel is 0 for all
    classes that are neither a label nor a negative.

    Args:
      hidden: `[..., D]`, floating.
      kernel: `[D, V]`, or `[V, D]` with `class_axis=0`, of the dtype of `hidden` or a wider one.
      labels: class ids `[...]`, of any integer dtype.
      negatives: the result of a sampler: `[S]` for all rows, or `[..., S]` for each row.
      bias: `[V]`.
      class_axis: the axis of `kernel` that holds the classes.
      logit_soft_cap: positive bound of the logits. May be traced.
      label_log_expected_count: as in `sampled_softmax_cross_entropy`.
      temperature: divides the logits, in the dtype of the loss, after bias and soft cap. A scalar
        or an array with the axes of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each row, a scalar or an array with the axes of `labels` (size 1
        broadcasts).
      where: bool, a scalar or an array with the axes of `labels` (size 1 broadcasts): rows to
        include.
      ignore_index: label of rows that do not count.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 inputs). An id outside
      `[0, V)`, of a label or of a negative, makes loss and gradient of its rows NaN.

    Raises:
      TypeError: for a dtype or type that does not fit, such as a `hidden` wider than `kernel`.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ce_jax
      >>> items, users = jnp.ones((10_000, 4)), jnp.ones((2, 4))
      >>> negatives = ce_jax.uniform_negatives(jax.random.key(0), 50, 10_000)
      >>> loss = ce_jax.linear_sampled_softmax_cross_entropy
      >>> print(loss(users, items, jnp.array([3, 7777]), negatives, class_axis=0))
      [9.2104 9.2104]

    References:
      See `sampled_softmax_cross_entropy`.
    """
    if not isinstance(negatives, Negatives):
        raise TypeError(
            "negatives must be Negatives(ids, log_expected_count), the result of a sampler such as "
            f"uniform_negatives, got {type(negatives).__name__}"
        )
    return _linear_sampled_softmax(
        hidden,
        kernel,
        labels,
        negatives,
        bias,
        options.soft_cap("logit_soft_cap", logit_soft_cap),
        label_log_expected_count,
        sample_weight,
        where,
        options.temperature(temperature),
        class_axis=checks.int_option("class_axis", class_axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _linear_sampled_softmax(
    hidden: Array,
    kernel: Array,
    labels: Array,
    negatives: Negatives,
    bias: Array | None,
    logit_soft_cap: Array | None,
    label_log_expected_count: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    temperature: Array | None,
    *,
    class_axis: int,
    ignore_index: int | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    hidden, head, class_axis = head_of(hidden, kernel, bias, logit_soft_cap, class_axis)
    rows, classes, dtype = hidden.shape[:-1], head.kernel.shape[class_axis], wide(hidden.dtype)
    counts = checks.mask(where, rows, "the rows of hidden")
    label = targets.class_ids(labels, rows, classes, counts, ignore_index)
    drawn = _drawn(negatives, rows, classes, dtype)
    weights = reductions.weights(sample_weight, rows, dtype)
    hidden = targets.without_excluded(hidden, label.counts)
    hidden = targets.without_silent(hidden, weights)

    ids = drawn.ids if drawn.ids.ndim == 1 else drawn.ids.reshape(-1, drawn.ids.shape[-1])
    own, sampled = layer_logits(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        label.ids.ravel(),
        ids,
        class_axis,
        forward_mode=forward_mode,
    )
    drawn = jax.tree.map(lambda x: jnp.broadcast_to(x, (*rows, x.shape[-1])), drawn)
    unknown, of_each = drawn.unknown, None if weights is None else weights[..., None]
    if label.counts is not None:
        unknown = unknown & label.counts[..., None]
    sampled = targets.nan_if(unknown, sampled.reshape(drawn.ids.shape), of_each)
    own = targets.nan_if(label.unknown, own.reshape(rows), weights)
    included = drawn.exists & (drawn.ids != label.ids[..., None])
    return _loss(
        Compared(own, sampled, label.counts, included, weights),
        drawn.log_count,
        label_log_expected_count,
        temperature,
        reduction,
        forward_mode,
    )


class _Drawn(NamedTuple):
    """Negatives that are safe to index with.

    Attributes:
      ids: class ids in range.
      exists: whether there is a negative.
      unknown: whether it is no class.
      log_count: log expected count.
    """

    ids: Integer[Array, "*rows samples"]
    exists: Bool[Array, "*rows samples"]
    unknown: Bool[Array, "*rows samples"]
    log_count: Float[Array, "*rows samples"]


def _drawn(negatives: Negatives, rows: tuple[int, ...], classes: int, dtype: DTypeLike) -> _Drawn:
    ids = checks.integer("negatives.ids", negatives.ids)
    log_count = checks.floating("negatives.log_expected_count", negatives.log_expected_count)
    if ids.ndim != 1 and (ids.ndim != len(rows) + 1 or ids.shape[:-1] != rows):
        raise ValueError(
            f"negatives.ids must have shape [S] or that of labels, {rows}, and S; got {ids.shape}"
        )
    checks.shape_is("negatives.log_expected_count", log_count, ids.shape, "that of the ids")
    exists = log_count < jnp.inf
    found = targets.class_ids(ids, ids.shape, classes, exists, None)
    return _Drawn(found.ids, exists, found.unknown, log_count.astype(dtype))


def _loss(
    x: Compared,
    log_expected_count: ArrayLike | None,
    label_log_expected_count: ArrayLike | None,
    temperature: Array | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    def included(negatives: Array) -> Array:
        return negatives if x.included is None else jnp.where(x.included, negatives, -jnp.inf)

    label, negatives = x.label, included(x.negatives)
    if temperature is not None:  # their differences lose digits if they are divided before
        logits = jnp.concatenate([label[..., None], negatives], -1)
        logits = options.tempered_logits(logits, temperature, x.counts)
        label, negatives = logits[..., 0], logits[..., 1:]
    label = _corrected(label, "label_log_expected_count", label_log_expected_count)
    negatives = included(_corrected(negatives, "log_expected_count", log_expected_count))
    return softmax_cross_entropy_with_integer_labels(
        jnp.concatenate([label[..., None], negatives], -1),
        jnp.zeros(label.shape, jnp.int32),
        where=x.counts,
        sample_weight=x.weights,
        reduction=reduction.kind,
        reduction_axis=reduction.axis,
        forward_mode=forward_mode,
    )


def _corrected(z: Float[Array, "..."], name: str, log_count: ArrayLike | None) -> Array:
    if log_count is None:
        return z
    log_count = checks.real(name, log_count).astype(z.dtype)
    # Counts of negatives may be the same for all rows; the count of a label belongs to its row.
    fit = checks.of_rows if name == "label_log_expected_count" else checks.broadcast
    return z - fit(name, log_count, z.shape, "the logits")
