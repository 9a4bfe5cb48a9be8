"""Statistics of each row of a linear layer's logits, without the logits in memory."""

from __future__ import annotations

import jax
from jaxtyping import Array

from ._arguments import checks, options
from ._arguments.compiled import compiled
from ._arguments.layer import Layer, head_of, layer
from ._arguments.types import ArrayLike, Scalar
from ._rows import class_blocks
from ._rows.order import as_given
from ._rows.tile import RowStatistics, Target
from .statistics import SoftmaxStatistics, by_label


def of_layer(found: RowStatistics, x: Layer) -> SoftmaxStatistics:
    """The rows' statistics in the shape of the loss."""
    given = as_given(x.order, by_label(found, x.label))
    return jax.tree.map(lambda row: row.reshape(x.rows), given)


def linear_softmax_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    num_classes: int | None = None,
    logit_soft_cap: Scalar | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: str | None = None,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> SoftmaxStatistics:
    r"""Log-normaliser, label log-probability, entropy and argmax of a linear layer's softmax.

    The statistics of `softmax_statistics` for the logits of `linear_softmax_cross_entropy`,

    .. math::
      z = \mathrm{cap} \tanh\!\left(\frac{h W + b}{\mathrm{cap}}\right)
      \qquad (z = h W + b \text{ without a cap})

    computed in blocks of classes: the logits are never in memory at once. All statistics but
    `argmax` are differentiable. One use is reinforcement learning, which needs log-probability and
    entropy of each token: the result takes a few numbers per token.

    Args:
      hidden: `[..., D]`, floating.
      kernel: `[D, V]`, or `[V, D]` with `class_axis=0`, of the dtype of `hidden` or a wider one.
      labels: class ids `[...]`, of any integer dtype. Without labels, `label_logit` and `log_prob`
        are None.
      bias: `[V]`.
      class_axis: the axis of `kernel` that holds the classes.
      num_classes: number of classes; further classes of `kernel` are padding, which is ignored. By
        default there is no padding.
      logit_soft_cap: positive bound of the logits. May be traced.
      temperature: divides the logits, in float32, after bias and soft cap. A scalar or an array
        with the axes of `labels` (size 1 broadcasts). At least 1e-6. May be traced.
      where: bool, a scalar or an array with the axes of `labels` (size 1 broadcasts): rows to
        include.
      ignore_index: label of rows that do not count.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `kernel` and `bias` are
        sharded by classes.
      memory_budget: bytes that a block of logits and its gradient may take, by default as in
        `linear_softmax_cross_entropy`.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      A named tuple of arrays of shape `[...]` in nats, float32 (float64 for float64 inputs), and
      `argmax`, int32. All statistics of a row that does not count are 0. `label_logit` and
      `log_prob` are NaN for a label that is not a class.

    Raises:
      TypeError: for a dtype or type that does not fit, such as a `hidden` wider than `kernel`.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> hidden, kernel = jnp.eye(2), jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> found = ce_jax.linear_softmax_statistics(hidden, kernel, jnp.array([0, 2]))
      >>> print(found.log_prob.round(4), found.argmax)
      [-0.0949 -1.0986] [0 0]

    References:
      Shannon, `A Mathematical Theory of Communication`, 1948.
    """
    return _linear_statistics(
        hidden,
        kernel,
        labels,
        bias,
        options.soft_cap("logit_soft_cap", logit_soft_cap),
        options.temperature(temperature),
        where,
        class_axis=checks.int_option("class_axis", class_axis),
        num_classes=checks.integer_option("num_classes", num_classes),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        axis_name=axis_name,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _linear_statistics(
    hidden: Array,
    kernel: Array,
    labels: Array | None,
    bias: Array | None,
    logit_soft_cap: Array | None,
    temperature: Array | None,
    where: Array | None,
    *,
    class_axis: int,
    num_classes: int | None,
    ignore_index: int | None,
    axis_name: str | None,
    memory_budget: int | None,
    forward_mode: bool,
) -> SoftmaxStatistics:
    x = layer(
        *head_of(hidden, kernel, bias, logit_soft_cap, class_axis),
        labels,
        temperature,
        where,
        num_classes=num_classes,
        ignore_index=ignore_index,
        axis_name=axis_name,
        memory_budget=memory_budget,
        summed=False,
        statistics=True,
    )
    target = Target(labels=x.label.ids)
    found = class_blocks.row_statistics(
        x.options, x.tokens, x.head, target, x.counting, forward_mode=forward_mode
    )
    return of_layer(found, x)
