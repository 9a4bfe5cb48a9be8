"""Results of a loop over blocks of columns; the derivative computes each block again.

The columns are classes, or the other side of pairs. A loss brings a `Form`, which says what a block
adds to the sums of the rows, and what it gives to the cotangents. The loop is here, with its
derivative and the care for dtypes and devices.

Where only the first so many rows count, the rows of a block are visited in tiles, up to the last of
those: the time goes with the rows that count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from .._platform import block_sizes
from . import sharded
from .blocks import over_blocks, put, read_by_all, take
from .dtypes import wide
from .numerics import instantiated
from .order import Counting, over_rows
from .picked import First


class Part(NamedTuple):
    """What a block reads of an input.

    Attributes:
      axis: the axis that holds the columns, of which it reads its own; None if it reads all.
      by_row: whether the first axis holds the rows.
      dtype: in which it reads the numbers; None for that of the input.
    """

    axis: int | None = None
    by_row: bool = False
    dtype: DTypeLike | None = None


class Form(NamedTuple):
    """How blocks are read and joined.

    Attributes:
      start: `start(inputs, fixed, counting)`, the sums over no columns.
      fold: `fold(inputs, fixed, sums, first)`, the sums with the columns of a block more, of which
        `first` is the first. The inputs are what the block reads of them.
      pull: `pull(inputs, fixed, sums, g, first)`, what a block gives to the cotangents of what it
        reads.
      parts: what it reads; a pytree of `Part` like the inputs.
      columns: how many columns there are.
      block: how many at a time.
      across: joins the sums of all devices, if the columns' or rows' are to be joined.
      finish: turns the sums into the result.
      rows: how many rows there are, if they go in tiles.
      tile: rows at a time, if not all count. Constants, sums and result then are by row.
      cotangents: makes arrays of the result's cotangents, where JAX knows some to be 0.
    """

    start: Callable[[Any, Any, Counting], Any]
    fold: Callable[[Any, Any, Any, First], Any]
    pull: Callable[[Any, Any, Any, Any, First], Any]
    parts: Any
    columns: int
    block: int
    across: Callable[[Any], Any] = lambda sums: sums
    finish: Callable[[Any], Any] = lambda sums: sums
    rows: int = 0
    tile: int = 0
    cotangents: Callable[[Any], Any] = instantiated


def over_columns(
    form: Form, inputs: Any, fixed: Any, counting: Counting = None, *, forward_mode: bool = False
) -> Any:
    """The result of a form, differentiable by `inputs`; `fixed` are constants.

    If `counting` is not None, only so many of the rows are visited, the first. The sums of the
    others are those of the start, or of whatever they hold.
    """
    given = sharded.align((inputs, fixed, counting))
    return _finished(form, *given)[0] if forward_mode else _fused(form, *given)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def sums_of(form: Form, inputs: Any, fixed: Any, counting: Counting) -> Any:
    """The sums over all columns, those of all devices if they are to be joined."""
    of_block = _read_by_blocks(form, inputs)

    def step(sums: Any, first: First, size: int) -> Any:
        of_tile = of_block(first, size)

        def fold(sums: Any, row: First, rows: int) -> Any:
            some = functools.partial(_rows, counting, row, rows)
            constants, seen = some((fixed, sums))
            found = form.fold(some(of_tile(), form.parts), constants, seen, first)
            return jax.tree.map(lambda x, new: put(x, new, row), sums, found)

        return over_rows(fold, sums, form.rows, form.tile, counting)

    start = sharded.like(form.start(inputs, fixed, counting), jax.tree.leaves(inputs)[0])
    return form.across(over_blocks(step, start, form.columns, form.block))


# Traced once, for the result and for the rule of its derivative.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _finished(form: Form, inputs: Any, fixed: Any, counting: Counting) -> tuple[Any, Any]:
    """The result, and the sums it is made of."""
    found = sums_of(form, inputs, fixed, counting)
    return form.finish(found), found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(form: Form, inputs: Any, fixed: Any, counting: Counting) -> Any:
    return _finished(form, inputs, fixed, counting)[0]


def _fused_fwd(form: Form, *primals: Any) -> tuple[Any, Any]:
    given: Any = jax.tree.map(lambda x: x.value, primals)
    result, found = _finished(form, *given)
    return result, (*given, found)


def _fused_bwd(form: Form, residuals: Any, g: Any) -> tuple[Any, None, None]:
    return pulled_back(form, residuals, form.cotangents(g)), None, None


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


# As a whole for those who differentiate outside `jit`, where loops would be compiled in each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def pulled_back(form: Form, residuals: Any, g: Any) -> Any:
    """Cotangents of the inputs, given those of the result; `residuals` are all but the form."""
    residuals = jax.tree.map(jnp.asarray, residuals)  # a scalar may come as a literal
    (inputs, fixed, counting, sums), g = sharded.align((residuals, g))
    of_block = _read_by_blocks(form, inputs)

    def zeros(x: Array, part: Part) -> Array:
        """To add up in the wide dtype what every block or tile adds to."""
        in_wide = part.axis is None or block_sizes.gathers_wide()
        return jnp.zeros(x.shape, wide(x.dtype) if in_wide else x.dtype)

    def step(carry: Any, first: First, size: int) -> Any:
        of_tile = of_block(first, size)

        def pull(d: Any, row: First, rows: int) -> Any:
            some = functools.partial(_rows, counting, row, rows)
            constants, seen, g_rows = some((fixed, sums, g))
            more = form.pull(some(of_tile(), form.parts), constants, seen, g_rows, first)
            added = jax.tree.map(jnp.add, some(d, form.parts), more)
            return jax.tree.map(lambda d, new: put(d, new, row), d, added)

        def nothing(d: Array, part: Part) -> Array:
            if part.axis is None:
                return d
            shape = (*d.shape[: part.axis], size, *d.shape[part.axis + 1 :])
            return sharded.like(jnp.zeros(shape, wide(d.dtype)), jax.tree.leaves(inputs)[0])

        def written(d: Array, block: Array, part: Part) -> Array:
            return block if part.axis is None else put(d, block, first, part.axis)

        d = jax.tree.map(nothing, carry, form.parts)
        d = over_rows(pull, d, form.rows, form.tile, counting)
        return jax.tree.map(written, carry, d, form.parts)

    start = sharded.like(jax.tree.map(zeros, inputs, form.parts), jax.tree.leaves(inputs)[0])
    grads = over_blocks(step, start, form.columns, form.block)
    return jax.tree.map(lambda x, d: d.astype(x.dtype), inputs, grads)


def _read_by_blocks(form: Form, inputs: Any) -> Callable[[First, int], Callable[[], Any]]:
    """For each block, how its tiles find what they read."""

    def whole(x: Array, part: Part) -> Array | None:
        return x if part.axis is None else None

    of_all = read_by_all(jax.tree.map(whole, inputs, form.parts))

    def of_block(first: First, size: int) -> Callable[[], Any]:
        def own(x: Array, part: Part) -> Array | None:
            return None if part.axis is None else take(x, first, size, part.axis)

        def cast(x: Array | None, part: Part | None) -> Array | None:
            return x if x is None or part is None or part.dtype is None else x.astype(part.dtype)

        block = jax.tree.map(own, inputs, form.parts)
        read = jax.tree.map(cast, block, form.parts, is_leaf=_is_none)
        of_own = read_by_all(block, read)
        return lambda: jax.tree.map(
            lambda x, own: own if x is None else x, of_all(), of_own(), is_leaf=_is_none
        )

    return of_block


def _is_none(x: Any) -> bool:
    return x is None


def _rows(counting: Counting, first: First, size: int, tree: Any, parts: Any = None) -> Any:
    """The rows of a tile, of what is by row; all of everything if there are no tiles."""
    if counting is None:
        return tree
    if parts is None:
        return jax.tree.map(lambda x: take(x, first, size), tree)
    return jax.tree.map(lambda x, part: take(x, first, size) if part.by_row else x, tree, parts)
