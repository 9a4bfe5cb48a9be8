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
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from .. import _platform
from . import class_blocks, sharded, tile
from .blocks import over_blocks, put, read_by_all, take
from .dtypes import wide
from .head import Head, Tokens, logits, take_classes
from .numerics import instantiated
from .order import Counting, if_counting
from .picked import First


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
      by_class: options of the head in blocks of classes, for the value alone and for statistics.
    """

    block: int
    row_loss: RowLoss
    by_class: class_blocks.Options


# The sum of the losses and, if they are wanted, the rows' statistics.
_Result = tuple[Float[Array, ""], tile.RowStatistics]


def loss_sum(
    options: Options,
    tokens: Tokens,
    head: Head,
    target: tile.Target,
    rows: RowInputs,
    counting: Counting,
) -> _Result:
    """The sum of `row_loss` over all rows."""
    # Every block reads all classes it is given: 0 times padding that is not finite would be NaN.
    head = take_classes(head, options.by_class.classes, options.by_class.class_axis)
    if target.classes is not None and target.classes.ndim:
        target = target._replace(classes=take(target.classes, 0, options.by_class.classes))
    return _fused(options, *sharded.align((tokens, head, target, rows, counting)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    options: Options,
    tokens: Tokens,
    head: Head,
    target: tile.Target,
    rows: RowInputs,
    counting: Counting,
) -> _Result:
    found = class_blocks.row_statistics(options.by_class, tokens, head, target, counting)
    total = jnp.sum(options.row_loss(found, rows))
    return total, found if options.by_class.statistics else tile.ABSENT


class _Inputs(NamedTuple):
    """The differentiable inputs, or their cotangents."""

    tokens: Tokens
    head: Head
    classes: Any
    scales: Any
    shared: Any


class _Residuals(NamedTuple):
    """Inputs, the cotangents of the sum, and what the statistics' cotangents need."""

    inputs: _Inputs
    grads: _Inputs
    target: tile.Target
    counting: Counting
    part: tile.Partial | None


def _fused_fwd(options: Options, *primals: Any) -> tuple[_Result, _Residuals]:
    given: Any = jax.tree.map(lambda x: x.value, primals)
    tokens, head, target, rows, counting = given
    # The kernel is cast once, to the dtype of the matmuls.
    narrow = head._replace(kernel=head.kernel.astype(tokens.hidden.dtype))
    head_of_block = read_by_all(head, narrow)
    wanted = {"entropy": options.by_class.statistics, "argmax": options.by_class.statistics}

    def step(
        carry: tuple[Array, _Inputs, Any], first: First, size: int
    ) -> tuple[Array, _Inputs, Any]:
        total, grads, seen = carry
        part = functools.partial(take, first=first, size=size)
        of_block = target._replace(labels=part(target.labels))
        block = jax.tree.map(part, rows._replace(shared=()))
        z, pull = logits(jax.tree.map(part, tokens), head_of_block(), options.by_class.class_axis)
        found = _platform.read(z, of_block, _platform.normaliser(z), **wanted)

        def block_loss(statistics: tile.RowStatistics, scales: Any, shared: Any) -> Array:
            inputs = block._replace(scales=scales, shared=shared)
            return jnp.sum(options.row_loss(statistics, inputs))

        loss, pull_loss = jax.vjp(block_loss, tile.finish(found), block.scales, rows.shared)
        g, d_scales, d_shared = pull_loss(jnp.ones_like(loss))
        dz, d_target = tile.pullback(z, of_block, found, g._replace(argmax=None, entropy=None))
        d_tokens, d_head = pull(dz)

        def of_rows(d: Array, new: Array) -> Array:
            return put(d, new, first)

        more = _Inputs(
            tokens=jax.tree.map(of_rows, grads.tokens, d_tokens),
            head=jax.tree.map(jnp.add, grads.head, d_head),
            classes=jax.tree.map(jnp.add, grads.classes, d_target.classes),
            scales=jax.tree.map(of_rows, grads.scales, d_scales),
            shared=jax.tree.map(lambda d, new: d + new.astype(d.dtype), grads.shared, d_shared),
        )
        seen = jax.tree.map(of_rows, seen, found) if options.by_class.statistics else None
        return total + loss, more, seen

    inputs = _Inputs(tokens, head, target.classes, rows.scales, rows.shared)
    dtype = wide(tokens.hidden.dtype)
    nothing = None
    if options.by_class.statistics:
        nothing = tile.nothing_seen(tokens.hidden.shape[:1], dtype, target, **wanted)
    zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), dtype), (0, inputs))
    total, grads, part = over_blocks(
        if_counting(step, counting),
        sharded.like((*zeros, nothing), tokens.hidden),
        tokens.hidden.shape[0],
        options.block,
    )
    found = tile.finish(part) if options.by_class.statistics else tile.ABSENT
    return (total, found), _Residuals(inputs, grads, target, counting, part)


def _fused_bwd(
    options: Options, residuals: _Residuals, g: tuple[Any, Any]
) -> tuple[Tokens, Head, tile.Target, RowInputs, None]:
    (g_total, g_found), inputs = g, residuals.inputs
    factor = instantiated(g_total)
    d = jax.tree.map(
        lambda x, dx: (factor * dx).astype(jnp.result_type(x)), inputs, residuals.grads
    )
    if not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(g_found)):
        # Their derivative computes all logits once more.
        *_, target, counting, part = residuals
        more = class_blocks.pulled_back(
            options.by_class,
            (inputs.tokens, inputs.head, target, counting, part),
            tile.cotangents(g_found),
        )
        tokens, head, classes = jax.tree.map(jnp.add, (d.tokens, d.head, d.classes), tuple(more))
        d = d._replace(tokens=tokens, head=head, classes=classes)
    rows = RowInputs(d.scales, d.shared, flags=None)
    return d.tokens, d.head, tile.Target(classes=d.classes), rows, None


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)
