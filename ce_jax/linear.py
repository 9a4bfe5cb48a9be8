r"""Softmax cross-entropy of `hidden @ kernel` without ever holding the logits.

The stages are those of `softmax.py`. Row statistics come from blocks of classes
(`_rows.class_blocks`) or, for a loss that is summed, from blocks of tokens (`_rows.token_blocks`);
`_platform.block_sizes` chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.layer import head_of, layer
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, with_statistics
from ._rows import class_blocks, sharded, token_blocks
from ._rows.dtypes import wide
from ._rows.loss import counted, smoothing_coefficients, softmax_loss
from ._rows.numerics import silenced
from ._rows.order import as_given, in_order
from ._rows.tile import RowStatistics, Target
from .linear_statistics import of_layer
from .statistics import SoftmaxStatistics

LogProbLoss = Callable[[Array], Array]


@with_statistics
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    num_classes: int | None = None,
    logit_soft_cap: Scalar | None = None,
    temperature: ArrayLike = 1.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    log_prob_loss: LogProbLoss | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    return_statistics: bool = False,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss | tuple[Loss, SoftmaxStatistics]:
    r"""Cross-entropy of a linear layer's softmax with class ids, without its logits in memory.

    For hidden states :math:`h`, kernel :math:`W` and bias :math:`b`, the loss is that of
    `softmax_cross_entropy_with_integer_labels`, option by option, on

    .. math::
      z = \mathrm{cap} \tanh\!\left(\frac{h W + b}{\mathrm{cap}}\right)
      \qquad (z = h W + b \text{ without a cap})

    The logits are computed in float32, one block at a time. Their gradient is rounded to the dtype
    of `hidden` before it is multiplied with `kernel` and `hidden`. `hidden`, `kernel`, `bias`,
    `weight`, `sample_weight` and all float options get their true gradient.

    The work is divided in one of two ways, which give the same result. The default is blocks of
    classes, which are recomputed for the gradient (four matmuls). Blocks of tokens (three matmuls)
    are used for a "sum", "mean" or "ratio" over all tokens, if the budget has room for the logits
    of 1024 tokens, or of all tokens if there are fewer. They are not used with `axis_name` or
    `forward_mode`, nor with a `log_prob_loss` that has a traced parameter inside `jax.shard_map`.
    The value alone takes one matmul in both ways. The derivative of the statistics takes three
    matmuls more.

    Args:
      hidden: `[..., D]`, floating.
      kernel: `[D, V]`; or `[V, D]` with `class_axis=0`, the layout of a tied embedding (no
        transposed copy is made). Its dtype is that of `hidden` or a wider one. The matmuls run in
        the dtype of `hidden`; the gradient of a wider kernel keeps the kernel's dtype.
      labels: class ids `[...]`, of any integer dtype.
      bias: `[V]`. A bias of -inf bans a class.
      class_axis: the axis of `kernel` that holds the classes.
      num_classes: number of classes; further classes of `kernel` are padding, which is ignored. By
        default there is no padding.
      logit_soft_cap: positive bound of the logits. May be traced.
      temperature: divides the logits, in float32, after bias and soft cap. A scalar or an array
        with the axes of `labels` (size 1 broadcasts). At least 1e-6. May be traced.
      weight: weight of each class `[V]`.
      sample_weight: weight of each example, a scalar or an array with the axes of `labels` (size 1
        broadcasts).
      where: bool, a scalar or an array with the axes of `labels` (size 1 broadcasts): rows to
        include. (Classes are excluded by `bias`.)
      ignore_index: label of rows that do not count.
      label_smoothing: share of the target that is spread evenly over the allowed classes, in
        [0, 1]. May be traced.
      z_loss: coefficient of the squared log-normaliser, at least 0. May be traced.
      log_prob_loss: replaces the negative log-probability of the label: a function of one
        log-probability, a scalar, such as `ce_jax.focal_loss`. Class weights and 1 - eps of the
        smoothing multiply it; the part of all classes, eps / K, stays that of the plain loss.
        Outside `jit`, each new function object is compiled again: define it at module level.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `kernel`, `bias` and `weight`
        are sharded by classes. Labels are ids among all classes. `hidden` and the loss are the same
        on all devices of that axis.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight * weight[label])` of the rows that count (0 if that is 0; see
        `mean_denominator`).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      return_statistics: return `(loss, statistics)` from one pass, with the statistics of
        `linear_softmax_statistics`. The accuracy is the mean of `statistics.argmax == labels` over
        the rows that count (`jnp.mean(..., where=...)`): of others the argmax is 0.
      memory_budget: bytes that a block of logits and its gradient may take. The default is a third
        of the kernel's bytes in the dtype of `hidden`, within 256 MB and 1 GB. For a sum or mean
        with a narrow `hidden` and a float32 kernel it is a quarter of all logits, up to 1.3 GB, or
        the bytes of 1024 tokens, up to 2 GB. On a CPU it is 17 MB, and less if the CPU simulates
        several devices.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules, in the same memory.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 for float64 inputs), and the
      statistics if asked for. A label outside `[0, V)` that is not `ignore_index` makes loss and
      gradient of its row NaN.

    Raises:
      TypeError: for a dtype or type that does not fit, such as a `hidden` wider than `kernel`.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 4))
      >>> print(ce_jax.linear_softmax_cross_entropy(hidden, kernel, jnp.array([0, 3])))
      [1.3863 1.3863]

    References:
      Wijmans et al., `Cut Your Losses in Large-Vocabulary Language Models`, 2024 (recomputed
      blocks); Hsu et al., `Liger Kernel`, 2024 (gradients in the forward pass).
    """
    if labels is None:
        raise TypeError("labels must be an array, got None")
    return _linear_loss(
        hidden,
        kernel,
        labels,
        bias,
        options.soft_cap("logit_soft_cap", logit_soft_cap),
        options.temperature(temperature),
        weight,
        sample_weight,
        where,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        options.not_zero("z_loss", z_loss),
        class_axis=checks.int_option("class_axis", class_axis),
        num_classes=checks.integer_option("num_classes", num_classes),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        log_prob_loss=checks.maybe_function("log_prob_loss", log_prob_loss),
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        return_statistics=return_statistics,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _linear_loss(
    hidden: Array,
    kernel: Array,
    labels: Array,
    bias: Array | None,
    logit_soft_cap: Array | None,
    temperature: Array | None,
    weight: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    label_smoothing: Array | None,
    z_loss: Array | None,
    *,
    class_axis: int,
    num_classes: int | None,
    ignore_index: int | None,
    log_prob_loss: LogProbLoss | None,
    axis_name: str | None,
    reduction: Reducer,
    return_statistics: bool,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss | tuple[Loss, SoftmaxStatistics]:
    hidden, head, class_axis = head_of(hidden, kernel, bias, logit_soft_cap, class_axis)
    if len(reduction.axes(hidden.ndim - 1)) == hidden.ndim - 1:
        reduction = reduction._replace(axis=None)
    over_all = reduction.kind != "none" and reduction.axis is None
    summed = over_all and not (axis_name or forward_mode)
    constants: Sequence[Any] = ()
    if log_prob_loss is not None:
        one = jnp.zeros((), wide(hidden.dtype))
        checks.log_prob_loss(log_prob_loss, one)
        converted, constants = jax.closure_convert(log_prob_loss, one)
        if constants and sharded.inside_shard_map():
            # The converted function is typed as the same on all devices; rows are not.
            summed, constants = False, ()
        elif constants:
            log_prob_loss = converted
    x = layer(
        hidden,
        head,
        class_axis,
        labels,
        temperature,
        where,
        num_classes=num_classes,
        ignore_index=ignore_index,
        axis_name=axis_name,
        memory_budget=memory_budget,
        summed=summed,
        statistics=return_statistics,
    )
    local, dtype = x.head.kernel.shape[x.options.class_axis], wide(x.tokens.hidden.dtype)
    weight = targets.class_weight(weight, local, dtype)
    sample_weight = reductions.weights(sample_weight, x.rows, dtype)
    label_weight = None
    if weight is not None:
        label_weight = sharded.take_class(weight, x.label.ids, axis_name)
    target = Target(labels=x.label.ids)
    if label_smoothing is not None:
        spread = smoothing_coefficients(weight, x.options.classes, dtype)
        target = target._replace(classes=spread)
    if sample_weight is not None:
        sample_weight = in_order(x.order, sample_weight.ravel())
        hidden = targets.without_silent(x.tokens.hidden, sample_weight)
        x = x._replace(tokens=x.tokens._replace(hidden=hidden))

    scalars = [None if s is None else jnp.asarray(s, dtype) for s in (label_smoothing, z_loss)]
    row_loss = functools.partial(_row_loss, log_prob_loss, x.options.classes)
    inputs = token_blocks.RowInputs(
        scales=(label_weight, sample_weight),
        shared=(*scalars, *constants),
        flags=(x.label.counts, x.label.unknown),
    )
    if x.token_block is not None:
        by_token = token_blocks.Options(x.token_block, row_loss, x.options)
        total, found = token_blocks.loss_sum(by_token, x.tokens, x.head, target, inputs, x.counting)
        loss = reductions.of_total(
            total, reduction, x.label.ids.shape, x.label.counts, sample_weight, label_weight
        )
    else:
        found = class_blocks.row_statistics(
            x.options, x.tokens, x.head, target, x.counting, forward_mode=forward_mode
        )
        by_row = row_loss(found, inputs), x.label.counts, sample_weight, label_weight
        losses, counts, *weights = jax.tree.map(
            lambda row: row.reshape(x.rows), as_given(x.order, by_row)
        )
        loss = reductions.combined(losses, reduction, counts, *weights)
    return (loss, of_layer(found, x)) if return_statistics else loss


def _row_loss(
    log_prob_loss: Callable[..., Array] | None,
    classes: int,
    found: RowStatistics,
    inputs: token_blocks.RowInputs,
) -> Float[Array, " tokens"]:
    label_weight, sample_weight = inputs.scales
    label_smoothing, z_loss, *constants = inputs.shared
    counts, unknown = inputs.flags
    found = silenced(sample_weight, counted(counts, found))
    if log_prob_loss is not None:
        constant = (None,) * len(constants)
        of_rows = jax.vmap(log_prob_loss, in_axes=(0, *constant))
        found = found._replace(cross=of_rows(-found.cross, *constants))
    loss = softmax_loss(found, label_weight, label_smoothing, z_loss, classes=classes)
    loss = targets.nan_if(unknown, loss, sample_weight)
    return reductions.masked(loss, counts, sample_weight)
