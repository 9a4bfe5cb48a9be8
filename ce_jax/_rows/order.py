"""Brings the rows that count to the front, and back.

Blocks of rows behind them need not be computed. The order is a permutation with a few places more:
nothing has a size that depends on the mask, and the derivative of bringing rows into order is to
bring cotangents back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from .blocks import over_blocks
from .picked import First

_Tree = TypeVar("_Tree")
_Carry = TypeVar("_Carry")

# How many rows count, which are the first; None for all.
Counting = Integer[Array, ""] | None


class Order(NamedTuple):
    """First the rows that count, then the others, each as they were, then places without a row.

    Attributes:
      rows: the row at each place; a place without one has a number above all rows.
      places: the place of each row.
      counting: how many rows count.
    """

    rows: Integer[Array, " places"]
    places: Integer[Array, " tokens"]
    counting: Integer[Array, ""]


def in_tiles(total: int, tile: int) -> bool:
    """Whether rows are computed in several tiles, of which some can be left out."""
    return not isinstance(total, int) or tile < total  # may be symbolic


def order_of(counts: Bool[Array, " tokens"], tile: int) -> Order:
    """The order in which rows that count are the first, with places for whole tiles of rows."""
    total = counts.shape[0]
    if isinstance(total, int):  # may be symbolic
        counts = jnp.pad(counts, (0, -total % tile))
    every = jnp.arange(counts.shape[0], dtype=jnp.int32)
    # Rows that do not count get larger numbers and one sort does all: sorting by a key takes three
    # times as long on a CPU.
    rows = jnp.sort(jnp.where(counts, every, every + counts.shape[0])) % counts.shape[0]
    places = jnp.zeros_like(rows).at[rows].set(every, unique_indices=True)
    return Order(rows, places[:total], jnp.sum(counts, dtype=jnp.int32))


def in_order(order: Order | None, tree: _Tree, fill: int = 0) -> _Tree:
    """Arrays by rows, in this order; places without a row hold `fill`."""
    if order is None:
        return tree
    return jax.tree.map(
        lambda x: x.at[order.rows].get(unique_indices=True, mode="fill", fill_value=fill), tree
    )


def as_given(order: Order | None, tree: _Tree) -> _Tree:
    """The arrays whose rows were brought into this order, as they were before."""
    if order is None:
        return tree
    return jax.tree.map(
        lambda x: x.at[order.places].get(unique_indices=True, mode="promise_in_bounds"), tree
    )


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
    return over_blocks(if_counting(step, counting), carry, total, tile)


def if_counting(
    step: Callable[[_Carry, First, int], _Carry], counting: Counting
) -> Callable[[_Carry, First, int], _Carry]:
    """A step over some rows that is left out where none of them counts."""
    if counting is None:
        return step

    def if_any(carry: _Carry, first: First, size: int) -> _Carry:
        return jax.lax.cond(first < counting, lambda c: step(c, first, size), lambda c: c, carry)

    return if_any
