"""Brings the rows that count to the front, and back.

Blocks of rows behind them need not be computed. The order is a permutation: nothing has a size that
depends on the mask, and the derivative of bringing rows into order is to bring cotangents back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from .head import over_blocks, take
from .picked import First

_Tree = TypeVar("_Tree")
_Carry = TypeVar("_Carry")

# How many rows count, which are the first; None for all.
Counting = Integer[Array, ""] | None


class Order(NamedTuple):
    """A permutation of the rows: first those that count, then the others, each as they were.

    Attributes:
      rows: the row at each place.
      places: the place of each row.
      counting: how many rows count.
    """

    rows: Integer[Array, " tokens"]
    places: Integer[Array, " tokens"]
    counting: Integer[Array, ""]


def order_of(counts: Bool[Array, " tokens"]) -> Order:
    """The order in which rows that count are the first."""
    rows = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    every = jnp.arange(rows.shape[0], dtype=jnp.int32)
    places = jnp.zeros_like(rows).at[rows].set(every, unique_indices=True)
    return Order(rows, places, jnp.sum(counts, dtype=jnp.int32))


def in_order(order: Order | None, tree: _Tree) -> _Tree:
    """Arrays by rows, in this order."""
    return tree if order is None else _permuted(tree, order.rows)


def as_given(order: Order | None, tree: _Tree) -> _Tree:
    """The arrays whose rows were brought into this order, as they were before."""
    return tree if order is None else _permuted(tree, order.places)


def _permuted(tree: _Tree, rows: Integer[Array, " tokens"]) -> _Tree:
    permuted: _Tree = jax.tree.map(
        lambda x: x.at[rows].get(unique_indices=True, mode="promise_in_bounds"), tree
    )
    return permuted


def over_rows(
    step: Callable[[_Carry, First, int], _Carry],
    carry: _Carry,
    total: int,
    tile: int,
    counting: Counting,
) -> _Carry:
    """Runs `step(carry, first, size)` over all rows at once, or over tiles of which some count."""
    if counting is None:
        return step(carry, 0, total)
    return over_blocks(while_counting(step, counting), carry, total, tile)


def while_counting(
    step: Callable[[_Carry, First, int], _Carry], counting: Counting
) -> Callable[[_Carry, First, int], _Carry]:
    """A step over some rows that is left out where none of them counts."""
    if counting is None:
        return step

    def if_any(carry: _Carry, first: First, size: int) -> _Carry:
        return jax.lax.cond(first < counting, lambda c: step(c, first, size), lambda c: c, carry)

    return if_any


def rows_of(tree: _Tree, first: First, size: int) -> _Tree:
    """Some consecutive rows of all arrays."""
    part: _Tree = jax.tree.map(lambda x: take(x, first, size), tree)
    return part
