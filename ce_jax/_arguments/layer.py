"""Arguments of the linear form: checked, arranged in rows, and divided into blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._platform import block_sizes
from .._rows import class_blocks, sharded
from .._rows.dtypes import wide
from .._rows.head import Head, Tokens
from .._rows.order import Counting, Order, in_order, in_tiles, order_of
from . import checks, options, targets
from .types import ArrayLike


class Layer(NamedTuple):
    """The arguments of the linear form, checked, with their rows in one axis.

    Where not all rows count, those that do come first.

    Attributes:
      tokens: hidden states and temperature; 0 and 1 in rows that do not count.
      head: the kernel and what belongs to it.
      label: the class ids.
      order: the order of the rows; None for that of the arguments.
      rows: the shape of the loss.
      options: how to find row statistics by blocks of classes.
      token_block: tokens per block, if a sum is to be computed by blocks of tokens.
    """

    tokens: Tokens
    head: Head
    label: targets.ClassIds
    order: Order | None
    rows: tuple[int, ...]
    options: class_blocks.Options
    token_block: int | None

    @property
    def counting(self) -> Counting:
        """How many rows count; None for all."""
        return None if self.order is None else self.order.counting


def head_of(
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    soft_cap: ArrayLike | None,
    class_axis: int,
    prefix: str = "",
) -> tuple[Array, Head, int]:
    """The hidden states, the head, and the axis of its classes; names begin with `prefix`."""
    hidden = checks.floating(f"{prefix}hidden", hidden)
    kernel = checks.floating(f"{prefix}kernel", kernel)
    class_axis = checks.kernel_axis(hidden, kernel, class_axis, prefix)
    cure = "call the function inside jax.shard_map, which ce_jax.on_mesh does for most functions"
    for name, x in (("hidden", hidden), ("kernel", kernel)):
        checks.not_spread(f"{prefix}{name}", x, cure)
    head = Head(kernel)
    if bias is not None:
        bias = checks.floating(f"{prefix}bias", bias)
        checks.shape_is(f"{prefix}bias", bias, (kernel.shape[class_axis],), "one bias per class")
        head = head._replace(bias=bias)
    if soft_cap is not None:
        head = head._replace(soft_cap=jnp.asarray(soft_cap, wide(hidden.dtype)))
    return hidden, head, class_axis


def layer(
    hidden: Array,
    head: Head,
    class_axis: int,
    labels: ArrayLike | None,
    temperature: Array | None,
    where: ArrayLike | None,
    *,
    num_classes: int | None,
    ignore_index: int | None,
    axis_name: str | None,
    memory_budget: int | None,
    summed: bool,
    statistics: bool,
    picked: bool = False,
) -> Layer:
    """Checks the arguments, but for those of `head_of`, and divides the work."""
    dtype, rows, local = wide(hidden.dtype), hidden.shape[:-1], head.kernel.shape[class_axis]
    held = sharded.all_classes(local, axis_name)
    classes = checks.class_count(num_classes, held)
    counts = checks.mask(where, rows, "the rows of hidden")
    label = targets.maybe_class_ids(labels, rows, classes, counts, ignore_index)
    tokens = Tokens(targets.without_excluded(hidden, label.counts))
    of_row = options.row_temperature(temperature, rows, dtype, label.counts)
    if of_row is not None:
        tokens = tokens._replace(temperature=of_row)
    tokens, label = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(rows) :]), (tokens, label))
    count = tokens.hidden.shape[0]
    tile = block_sizes.rows(count)
    local_rows = all(map(sharded.is_local, jax.tree.leaves((tokens, label))))
    sorted_by = label.counts if local_rows and in_tiles(count, tile) else None

    # Bytes of a logit, of its gradient in the dtype of hidden, and of what a CPU stores for each
    # step from the matmul to the logit.
    steps = (head.bias is not None) + (head.soft_cap is not None) + (classes < held)
    steps += (temperature is not None) + picked
    logit_bytes = dtype.itemsize * (1 + steps) + hidden.dtype.itemsize
    visited = local if axis_name is not None else classes
    if memory_budget is None:
        sums_are_result = summed and hidden.dtype != dtype == head.kernel.dtype
        memory_budget = block_sizes.default_budget(
            head.kernel.size * hidden.dtype.itemsize,
            (count, visited * logit_bytes) if sums_are_result else None,
        )
    # With tiles of rows, less memory is needed per class, so a block may have more classes.
    at_once = count if sorted_by is None else -(-count // 2)
    work = at_once, visited, logit_bytes, memory_budget
    token_block = block_sizes.token_block(*work) if summed else None
    if token_block is not None:
        token_block = tile = token_block if sorted_by is None else min(token_block, tile)

    order = None
    if sorted_by is not None:
        order = order_of(sorted_by, tile)
        tokens = Tokens(in_order(order, tokens.hidden), in_order(order, tokens.temperature, fill=1))
        label = in_order(order, label)
    by_class = class_blocks.Options(
        block=block_sizes.class_block(*work),
        class_axis=class_axis,
        classes=classes,
        local=visited,
        axis_name=axis_name,
        statistics=statistics,
        tile=tile,
    )
    return Layer(tokens, head, label, order, rows, by_class, token_block)
