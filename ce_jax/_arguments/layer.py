"""The linear form's arguments: checked, by rows, with a plan of the blocks to compute them in."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._platform import block_sizes
from .._rows import class_blocks, sharded
from .._rows.head import Head
from .._rows.tile import wide
from . import checks, targets
from .types import ArrayLike


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
    label: targets.ClassIds
    rows: tuple[int, ...]
    options: class_blocks.Options
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
    hidden, kernel = checks.floating("hidden", hidden), checks.floating("kernel", kernel)
    class_axis = checks.kernel_axis(hidden, kernel, class_axis)
    dtype, rows, local = wide(hidden.dtype), hidden.shape[:-1], kernel.shape[class_axis]
    held = sharded.all_classes(local, axis_name)
    classes = checks.class_count(num_classes, held)
    head = Head(kernel)
    if bias is not None:
        bias = checks.floating("bias", bias)
        checks.shape_is("bias", bias, (local,), "one bias per class")
        head = head._replace(bias=bias)
    if logit_soft_cap is not None:
        head = head._replace(soft_cap=jnp.asarray(logit_soft_cap, dtype))

    counts = None
    if where is not None:
        counts = checks.boolean("where", where)
        counts = checks.of_rows("where", counts, rows, "the rows of hidden")
    label = targets.class_ids(labels, rows, classes, counts, ignore_index)
    label = jax.tree.map(jnp.ravel, label)
    hidden = targets.without_excluded(jnp.reshape(hidden, (-1, hidden.shape[-1])), label.counts)

    if memory_budget is None:
        memory_budget = block_sizes.default_budget(kernel.size * kernel.dtype.itemsize)
    # A logit, its gradient in the dtype of hidden, and what a CPU stores between the steps to it.
    steps = (bias is not None) + (logit_soft_cap is not None) + (classes < held)
    logit_bytes = dtype.itemsize * (1 + steps) + hidden.dtype.itemsize
    visited = local if axis_name is not None else classes
    blocks = block_sizes.blocks(hidden.shape[0], visited, logit_bytes, memory_budget, summed=summed)
    options = class_blocks.Options(
        blocks.classes, class_axis, classes, axis_name, entropy=statistics, argmax=statistics
    )
    return Layer(hidden, head, label, rows, options, blocks.tokens)
