"""Results of a loop over blocks of columns; the derivative computes each block again.

`class_blocks` does this for the statistics of one softmax. A loss that reads a block in another way
(both directions of a matrix, two matrices at once) brings a `Form`. The loop is here, with its
derivative and the care for dtypes and devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import sharded
from .dtypes import wide
from .head import over_blocks, put, read_by_all, take
from .order import Counting, over_rows, rows_of
from .picked import First

# For an input of which every block reads all.
WHOLE = -1


class Form(NamedTuple):
    """How blocks are read and joined.

    Attributes:
      start: `start(inputs, fixed)`, the sums over no columns.
      fold: `fold(inputs, fixed, sums, first, size)`, the sums with `size` more columns.
      across: joins the sums of all devices, if the columns' or rows' are to be joined.
      finish: turns the sums into the result.
      pull: `pull(inputs, fixed, sums, g, first, size)`, what the columns of a block give to the
        cotangents of the inputs; of an input with columns, the part that belongs to the block.
      axes: the axis of each input that holds the columns, or `WHOLE`; a pytree like the inputs.
      columns: how many columns there are.
      block: how many at a time.
    """

    start: Callable[[Any, Any], Any]
    fold: Callable[[Any, Any, Any, First, int], Any]
    across: Callable[[Any], Any]
    finish: Callable[[Any], Any]
    pull: Callable[[Any, Any, Any, Any, First, int], Any]
    axes: Any
    columns: int
    block: int


def over_columns(form: Form, inputs: Any, fixed: Any, *, forward_mode: bool = False) -> Any:
    """The result of a form, differentiable by `inputs`; `fixed` are constants."""
    inputs, fixed = sharded.align((inputs, fixed))
    if forward_mode:
        return form.finish(sums(form, inputs, fixed))
    return _fused(form, inputs, fixed)


# Traced once, for the result and for the rule of its derivative.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def sums(form: Form, inputs: Any, fixed: Any) -> Any:
    """The sums over all columns, those of all devices if they are to be joined."""
    inputs_of_block = read_by_all(inputs)

    def step(sums: Any, first: First, size: int) -> Any:
        return form.fold(inputs_of_block(), fixed, sums, first, size)

    start = sharded.like(form.start(inputs, fixed), jax.tree.leaves(inputs)[0])
    return form.across(over_blocks(step, start, form.columns, form.block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(form: Form, inputs: Any, fixed: Any) -> Any:
    return form.finish(sums(form, inputs, fixed))


def _fused_fwd(form: Form, inputs: Any, fixed: Any) -> tuple[Any, Any]:
    found = sums(form, inputs, fixed)
    return form.finish(found), (inputs, fixed, found)


# As a whole for those who differentiate outside `jit`, where loops would be compiled in each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fused_bwd(form: Form, residuals: Any, g: Any) -> tuple[Any, None]:
    residuals = jax.tree.map(jnp.asarray, residuals)  # a scalar may come as a literal
    (inputs, fixed, sums), g = sharded.align((residuals, g))
    inputs_of_block = read_by_all(inputs)

    def step(carry: Any, first: First, size: int) -> Any:
        def add(d: Array, new: Array, axis: int) -> Array:
            if axis == WHOLE:
                return d + new
            return new.astype(d.dtype) if new.shape == d.shape else put(d, new, first, axis)

        block = form.pull(inputs_of_block(), fixed, sums, g, first, size)
        return jax.tree.map(add, carry, block, form.axes)

    # What every block adds to adds up in the wide dtype; what is written once need not.
    zeros = jax.tree.map(
        lambda x, axis: jnp.zeros(x.shape, wide(x.dtype) if axis == WHOLE else x.dtype),
        inputs,
        form.axes,
    )
    zeros = sharded.like(zeros, jax.tree.leaves(inputs)[0])
    grads = over_blocks(step, zeros, form.columns, form.block)
    return jax.tree.map(lambda x, d: d.astype(x.dtype), inputs, grads), None


_fused.defvjp(_fused_fwd, _fused_bwd)


class Visited(NamedTuple):
    """The constants of a form whose rows are visited in tiles, and how many rows count."""

    fixed: Any
    counting: Counting


def in_tiles(form: Form, by_row: Any, total: int, tile: int) -> Form:
    """The form in which a block is visited in tiles of rows, up to the last row that counts.

    Its constants are `Visited`. The sums are those of the start in rows that are not visited.

    Args:
      form: whose sums, constants and result are by row.
      by_row: which of the inputs are by row, too; a pytree like the inputs.
      total: how many rows there are.
      tile: how many at a time.
    """

    def some(inputs: Any, row: First, rows: int) -> Any:
        return jax.tree.map(lambda x, own: take(x, row, rows) if own else x, inputs, by_row)

    def fold(inputs: Any, visited: Visited, sums: Any, first: First, size: int) -> Any:
        inputs_of_tile = read_by_all(inputs)

        def of_tile(sums: Any, row: First, rows: int) -> Any:
            of_rows = rows_of((visited.fixed, sums), row, rows)
            found = form.fold(some(inputs_of_tile(), row, rows), *of_rows, first, size)
            return jax.tree.map(lambda x, new: put(x, new, row), sums, found)

        return over_rows(of_tile, sums, total, tile, visited.counting)

    def pull(inputs: Any, visited: Visited, sums: Any, g: Any, first: First, size: int) -> Any:
        inputs_of_tile = read_by_all(inputs)

        def of_tile(d: Any, row: First, rows: int) -> Any:
            of_rows = rows_of((visited.fixed, sums, g), row, rows)
            more = form.pull(some(inputs_of_tile(), row, rows), *of_rows, first, size)
            return jax.tree.map(
                lambda d, new, own: put(d, new, row) if own else d + new, d, more, by_row
            )

        def zeros(x: Array, axis: int) -> Array:
            shape = list(x.shape)
            if axis != WHOLE:
                shape[axis] = size
            return jnp.zeros(shape, wide(x.dtype))

        d = sharded.like(jax.tree.map(zeros, inputs, form.axes), jax.tree.leaves(inputs)[0])
        return over_rows(of_tile, d, total, tile, visited.counting)

    return form._replace(
        start=lambda inputs, visited: form.start(inputs, visited.fixed), fold=fold, pull=pull
    )
