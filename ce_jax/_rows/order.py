"""Rows in an order in which those that count are the first, and back.

Blocks of rows behind them need not be computed. The order is a permutation: nothing has a size that
depends on the mask, and the derivative of bringing rows into order is to bring cotangents back.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

_Tree = TypeVar("_Tree")


class Order(NamedTuple):
    """The rows, first those that count, and how many these are."""

    rows: Integer[Array, " tokens"]
    counting: Integer[Array, ""]


def order_of(counts: Bool[Array, " tokens"]) -> Order:
    """Rows that count, then the others, each as they were."""
    return Order(jnp.argsort(~counts, stable=True), jnp.sum(counts, dtype=jnp.int32))


def in_order(order: Order | None, tree: _Tree) -> _Tree:
    """Arrays by rows, in this order."""
    if order is None:
        return tree
    rows = order.rows
    ordered: _Tree = jax.tree.map(
        lambda x: x.at[rows].get(unique_indices=True, mode="promise_in_bounds"), tree
    )
    return ordered


def as_given(order: Order | None, tree: _Tree) -> _Tree:
    """The arrays whose rows were brought into this order, as they were before."""
    if order is None:
        return tree
    rows = order.rows
    given: _Tree = jax.tree.map(
        lambda x: jnp.zeros_like(x).at[rows].set(x, unique_indices=True, mode="promise_in_bounds"),
        tree,
    )
    return given
