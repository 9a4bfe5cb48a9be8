"""Row statistics of `hidden @ kernel` in blocks of classes, which the backward pass recomputes.

Never more than one block of logits and of its gradient exist. Four matmuls of the size of the whole
product in all (`8 N D V` operations for value and gradient); any cotangent is served.

Where only the first so many rows count, the rows of a block are visited in tiles, up to the last of
those: the time goes with the rows that count.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import _platform
from . import sharded, tile
from .dtypes import wide
from .head import (
    Head,
    Pull,
    Tokens,
    head_read_by_all,
    logits,
    over_blocks,
    put,
    read_by_all,
    take,
    take_classes,
)
from .order import Counting, over_rows, rows_of
from .picked import First, pick
from .tile import ABSENT, Partial, Target, merge

_Carry = TypeVar("_Carry")


class Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      block: classes per block.
      class_axis: the axis of the kernel that holds the classes.
      classes: how many classes there are; what the kernels of all devices hold beyond is padding.
      axis_name: mapped mesh axis over which the classes are sharded.
      statistics: whether entropy and argmax are wanted, too.
      rows: rows per tile, where not all rows count.
    """

    block: int
    class_axis: int
    classes: int
    axis_name: str | None = None
    statistics: bool = False
    rows: int = 0


def row_statistics(
    options: Options,
    tokens: Tokens,
    head: Head,
    target: Target,
    counting: Counting = None,
    *,
    forward_mode: bool = False,
) -> tile.RowStatistics:
    """Statistics of each row of the logits, differentiable but for `argmax`.

    Those of rows that do not count are of no class, or of whatever the row holds.
    """
    sharded.check_sharded("kernel", head.kernel, options.axis_name)
    tokens, head, target, counting = sharded.align((tokens, head, target, counting))
    if forward_mode:
        return tile.finish(_partial(options, tokens, head, target, counting))
    return _fused(options, tokens, head, target, counting)


def block_logits(
    options: Options, tokens: Tokens, head: Head, first: First, size: int
) -> tuple[Float[Array, "tokens classes"], Pull]:
    """Logits of `size` classes from `first` on, and their pull-back."""
    return _of_block(tokens, _block(options, head, first, size), options.class_axis)


class _Block(NamedTuple):
    """The part of a head that gives the logits of some classes; which are real, if not all are."""

    head: Head
    real: Bool[Array, " classes"] | None


def _block(options: Options, head: Head, first: First, size: int) -> _Block:
    """Of classes that are padded it holds 0, as 0 times padding that is not finite would be NaN."""
    block = take_classes(head, first, size, options.class_axis)
    if not _padded(options, head):
        return _Block(block, None)
    real = jnp.arange(size, dtype=jnp.int32) + _first_class(options, head, first) < options.classes
    block = block._replace(
        kernel=jnp.where(jnp.expand_dims(real, 1 - options.class_axis), block.kernel, 0),
        bias=ABSENT if block.bias is None else jnp.where(real, block.bias, 0),
    )
    return _Block(block, real)


def _of_block(
    tokens: Tokens, block: _Block, class_axis: int
) -> tuple[Float[Array, "tokens classes"], Pull]:
    """Those of classes that are padded are -inf: a logit of 0 would count in the sum."""
    z, pull = logits(tokens, block.head, class_axis)
    return z if block.real is None else jnp.where(block.real[None], z, -jnp.inf), pull


def _padded(options: Options, head: Head) -> bool:
    """Whether a block may hold padding. Devices differ in theirs; one device leaves it out."""
    local = head.kernel.shape[options.class_axis]
    spread = options.axis_name is not None
    return spread and options.classes < sharded.all_classes(local, options.axis_name)


def _first_class(options: Options, head: Head, first: First) -> First:
    local = head.kernel.shape[options.class_axis]
    return sharded.first_class(local, options.axis_name) + first


def _target_of(target: Target, first: First, size: int) -> Target:
    """The part that belongs to some classes."""
    if target.classes is None or target.classes.ndim == 0:
        return target
    return target._replace(classes=take(target.classes, first, size))


def _by_row(target: Target) -> Target:
    """The part that belongs to rows."""
    return Target(labels=target.labels, picked=target.picked)


def _visited(options: Options, head: Head) -> int:
    """How many of the local classes to visit: without an axis name, padding is left out."""
    return options.classes if options.axis_name is None else head.kernel.shape[options.class_axis]


# Traced once, for the statistics and for the rule of their derivative.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _partial(
    options: Options, tokens: Tokens, head: Head, target: Target, counting: Counting
) -> Partial:
    tokens_of_tile = read_by_all(tokens)
    wanted = {"entropy": options.statistics, "argmax": options.statistics}

    def step(part: Partial, first: First, size: int) -> Partial:
        block = _block(options, head, first, size)
        block_of_tile = head_read_by_all(block.head, tokens)

        def tile_of_block(part: Partial, row: First, rows: int) -> Partial:
            inputs = tokens_of_tile(), _by_row(target), part
            of_rows, by_row, seen = rows_of(inputs, row, rows)
            z, _ = _of_block(of_rows, block._replace(head=block_of_tile()), options.class_axis)
            first_class = _first_class(options, head, first)
            z, picked = pick(z, by_row.picked, first_class)
            new = _platform.read(
                z,
                by_row._replace(classes=_target_of(target, first, size).classes),
                _platform.normaliser(z),
                **wanted,
                first_class=first_class,
            )
            found = merge(seen, new._replace(picked=picked))
            return jax.tree.map(lambda x, new: put(x, new, row), part, found)

        return over_rows(tile_of_block, part, tokens.hidden.shape[0], options.rows, counting)

    rows, dtype = tokens.hidden.shape[:1], wide(tokens.hidden.dtype)
    nothing = tile.nothing_seen(rows, dtype, target, **wanted)
    part = over_blocks(
        step, sharded.like(nothing, tokens.hidden), _visited(options, head), options.block
    )
    return sharded.merge_across(part, options.axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    options: Options, tokens: Tokens, head: Head, target: Target, counting: Counting
) -> tile.RowStatistics:
    return tile.finish(_partial(options, tokens, head, target, counting))


Residuals = tuple[Tokens, Head, Target, Counting, Partial]


def _fused_fwd(options: Options, *primals: Any) -> tuple[tile.RowStatistics, Residuals]:
    given: Any = jax.tree.map(lambda x: x.value, primals)
    part = _partial(options, *given)
    return tile.finish(part), (*given, part)


def _fused_bwd(
    options: Options, residuals: Residuals, g: tile.RowStatistics
) -> tuple[Tokens, Head, Target, None]:
    return *pulled_back(options, residuals, tile.cotangents(g)), None


# As a whole for those who differentiate outside `jit`, where loops would be compiled in each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def pulled_back(
    options: Options, residuals: Residuals, g: tile.RowStatistics
) -> tuple[Tokens, Head, Target]:
    """Cotangents of what the statistics were computed from, given theirs."""
    residuals, g = sharded.align((residuals, g))
    tokens, head, target, counting, part = residuals
    tokens_of_tile = read_by_all(tokens)

    def step(carry: tuple[Tokens, Head, Any], first: First, size: int) -> tuple[Tokens, Head, Any]:
        d_tokens, d_head, d_classes = carry
        block = _block(options, head, first, size)
        block_of_tile = head_read_by_all(block.head, tokens)
        of_block = _target_of(target, first, size)

        def tile_of_block(sums: tuple[Tokens, Head, Any], row: First, rows: int) -> Any:
            d_tokens, *others = sums
            of_rows, by_row, seen, g_rows = rows_of(
                (tokens_of_tile(), _by_row(target), part, g), row, rows
            )
            z, pull = _of_block(of_rows, block._replace(head=block_of_tile()), options.class_axis)
            dz, d_target = tile.pullback(
                z,
                by_row._replace(classes=of_block.classes),
                seen,
                g_rows,
                first_class=_first_class(options, head, first),
            )
            more, d_block = pull(dz)
            sums = jax.tree.map(jnp.add, rows_of(d_tokens, row, rows), more)
            return (
                jax.tree.map(lambda d, new: put(d, new, row), d_tokens, sums),
                *jax.tree.map(jnp.add, tuple(others), (d_block, d_target.classes)),
            )

        sums = (d_tokens, *_zeros((block.head, of_block.classes), tokens))
        d_tokens, d_block, more = over_rows(
            tile_of_block, sums, tokens.hidden.shape[0], options.rows, counting
        )
        d_head = Head(
            kernel=put(d_head.kernel, d_block.kernel, first, options.class_axis),
            bias=ABSENT if head.bias is None else put(d_head.bias, d_block.bias, first),
            soft_cap=ABSENT if head.soft_cap is None else d_head.soft_cap + d_block.soft_cap,
        )
        if d_classes is not None:
            d_classes = d_classes + more if d_classes.ndim == 0 else put(d_classes, more, first)
        return d_tokens, d_head, d_classes

    d_tokens = _zeros(tokens, tokens)
    others = sharded.like(jax.tree.map(jnp.zeros_like, (head, target.classes)), tokens.hidden)
    d_tokens, d_head, d_classes = over_blocks(
        step, (d_tokens, *others), _visited(options, head), options.block
    )
    d_tokens = jax.tree.map(lambda x, d: d.astype(x.dtype), tokens, d_tokens)
    return d_tokens, d_head, Target(classes=d_classes)


def _zeros(tree: _Carry, tokens: Tokens) -> _Carry:
    """Zeros to add up cotangents of these arrays in."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), tree)
    return sharded.like(zeros, tokens.hidden)


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)
