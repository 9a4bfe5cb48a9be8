"""The sum of a loss over the rows of `hidden @ kernel`, in blocks of tokens.

The derivative of a sum is known up to one factor before anybody asks for it. So the forward pass
computes the logits of a block once, and from them its loss and all its gradients at once: three
matmuls (`6 N D V` operations) where recomputing the logits takes four. The price is a block of
logits over all classes, and a gradient of the kernel that every block adds to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _platform
from . import class_blocks, sharded, tile
from .head import Head, over_blocks, put, read_by_all, take, take_classes
from .tile import First


class RowInputs(NamedTuple):
    """What the loss of a row is made of besides its statistics.

    Attributes:
      scales: tuple of arrays `[tokens]`.
      shared: tuple of arrays that are the same for all rows.
      flags: tuple of bool arrays `[tokens]`.

    Each array may be absent.
    """

    scales: Any
    shared: Any
    flags: Any


RowLoss = Callable[[tile.RowStatistics, RowInputs], Float[Array, " tokens"]]


class Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      block: tokens per block.
      row_loss: the loss of each row, weighted and masked.
      head: what the head is, and how it is read where no gradient is wanted.
    """

    block: int
    row_loss: RowLoss
    head: class_blocks.Options


def loss_sum(
    options: Options,
    hidden: Float[Array, "tokens width"],
    head: Head,
    target: tile.Target,
    rows: RowInputs,
) -> Float[Array, ""]:
    """The sum of `row_loss` over all rows."""
    # Every block reads all classes it is given: 0 times padding that is not finite would be NaN.
    head = take_classes(head, 0, options.head.classes, options.head.class_axis)
    if target.classes is not None and target.classes.ndim:
        target = target._replace(classes=take(target.classes, 0, options.head.classes))
    return _fused(options, *sharded.align((hidden, head, target, rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    options: Options, hidden: Array, head: Head, target: tile.Target, rows: RowInputs
) -> Float[Array, ""]:
    statistics = class_blocks.row_statistics(options.head, hidden, head, target)
    return jnp.sum(options.row_loss(statistics, rows))


class _Inputs(NamedTuple):
    """The differentiable inputs, or their cotangents."""

    hidden: Float[Array, "tokens width"]
    head: Head
    classes: Any
    scales: Any
    shared: Any


def _fused_fwd(
    options: Options, hidden: Array, head: Head, target: tile.Target, rows: RowInputs
) -> tuple[Array, tuple[_Inputs, _Inputs]]:
    head_of_block = read_by_all(head)

    def step(carry: tuple[Array, _Inputs], first: First, size: int) -> tuple[Array, _Inputs]:
        total, grads = carry
        head = head_of_block()
        part = functools.partial(take, first=first, size=size)
        of_block = target._replace(labels=part(target.labels))
        block = jax.tree.map(part, rows._replace(shared=()))
        z, pull = class_blocks.block_logits(
            options.head, part(hidden), head, 0, head.kernel.shape[options.head.class_axis]
        )
        partial = _platform.read(z, of_block, _platform.normaliser(z))

        def block_loss(statistics: tile.RowStatistics, scales: Any, shared: Any) -> Array:
            inputs = block._replace(scales=scales, shared=shared)
            return jnp.sum(options.row_loss(statistics, inputs))

        statistics = tile.finish(partial)
        loss, pull_loss = jax.vjp(block_loss, statistics, block.scales, rows.shared)
        g, d_scales, d_shared = pull_loss(jnp.ones_like(loss))
        dz, d_target = tile.pullback(z, of_block, partial, g)
        d_hidden, d_head = pull(dz)
        return total + loss, _Inputs(
            hidden=put(grads.hidden, d_hidden.T, first),
            head=jax.tree.map(jnp.add, grads.head, d_head),
            classes=jax.tree.map(jnp.add, grads.classes, d_target.classes),
            scales=jax.tree.map(lambda d, new: put(d, new, first), grads.scales, d_scales),
            shared=jax.tree.map(lambda d, new: d + new.astype(d.dtype), grads.shared, d_shared),
        )

    inputs = _Inputs(hidden, head, target.classes, rows.scales, rows.shared)
    dtype = tile.wide(hidden.dtype)
    zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), dtype), (0, inputs))
    total, grads = over_blocks(step, sharded.like(zeros, hidden), hidden.shape[0], options.block)
    return total, (inputs, grads)


def _fused_bwd(
    options: Options, residuals: tuple[_Inputs, _Inputs], g: Float[Array, ""]
) -> tuple[Array, Head, tile.Target, RowInputs]:
    inputs, grads = residuals
    d = jax.tree.map(lambda x, dx: (g * dx).astype(jnp.result_type(x)), inputs, grads)
    rows = RowInputs(d.scales, d.shared, flags=None)
    return d.hidden, d.head, tile.Target(classes=d.classes), rows


_fused.defvjp(_fused_fwd, _fused_bwd)
