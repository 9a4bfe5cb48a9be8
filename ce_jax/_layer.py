"""The linear form's arguments: checked, by rows, with a plan of the blocks to compute them in."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from . import _budget, _checks, _class_blocks, _sharded, _target
from ._head import Head
from ._tile import wide


class Layer(NamedTuple):
    """The arguments of the linear form, checked, with their rows in one axis.

    Attributes:
      hidden: 0 in rows that do not count.
      head: the kernel and what belongs to it.
      label: the class ids.
      rows: the shape of the loss.
      options: how to find row statistics by blocks of classes.
      token_block: tokens per block, if a sum is to be computed by blocks of tokens.
    """

    hidden: Float[Array, "tokens width"]
    head: Head
    label: _target.ClassIds
    rows: tuple[int, ...]
    options: _class_blocks.Options
    token_block: int | None


def layer(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None,
    logit_soft_cap: ArrayLike | None,
    where: ArrayLike | None,
    *,
    class_axis: int,
    num_classes: int | None,
    ignore_index: int | None,
    axis_name: str | None,
    memory_budget: int | None,
    summed: bool,
    statistics: bool,
) -> Layer:
    """Checks the arguments and divides the work."""
    hidden, kernel = _checks.floating("hidden", hidden), _checks.floating("kernel", kernel)
    class_axis = _checks.kernel_axis(hidden, kernel, class_axis)
    dtype, rows, local = wide(hidden.dtype), hidden.shape[:-1], kernel.shape[class_axis]
    held = _sharded.all_classes(local, axis_name)
    classes = _checks.class_count(num_classes, held)
    head = Head(kernel)
    if bias is not None:
        bias = _checks.floating("bias", bias)
        _checks.shape_is("bias", bias, (local,), "one bias per class")
        head = head._replace(bias=bias)
    if logit_soft_cap is not None:
        head = head._replace(soft_cap=jnp.asarray(logit_soft_cap, dtype))

    counts = None
    if where is not None:
        counts = _checks.boolean("where", where)
        counts = _checks.broadcast("where", counts, rows, "the rows of hidden")
    label = _target.class_ids(labels, rows, classes, counts, ignore_index)
    label = jax.tree.map(jnp.ravel, label)
    hidden = _target.without_excluded(jnp.reshape(hidden, (-1, hidden.shape[-1])), label.counts)

    if memory_budget is None:
        memory_budget = _budget.default_budget(kernel.size * kernel.dtype.itemsize)
    # A logit, its gradient in the dtype of hidden, and what a CPU stores between the steps to it.
    steps = (bias is not None) + (logit_soft_cap is not None) + (classes < held)
    logit_bytes = dtype.itemsize * (1 + steps) + hidden.dtype.itemsize
    visited = local if axis_name is not None else classes
    blocks = _budget.blocks(hidden.shape[0], visited, logit_bytes, memory_budget, summed=summed)
    options = _class_blocks.Options(
        blocks.classes, class_axis, classes, axis_name, entropy=statistics, argmax=statistics
    )
    return Layer(hidden, head, label, rows, options, blocks.tokens)
