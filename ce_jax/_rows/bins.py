"""Bins of examples and their sums, exact for any number of examples."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

# At most so many partial sums of one bin, and so many of all bins together.
_MOST_PARTS = 512
_PARTS_OF_BINS = 2**20


def bin_of_rank(
    rank: Integer[Array, " n"], size: Integer[Array, ""], bins: int
) -> Integer[Array, " n"]:
    """`rank * bins // size`, by long multiplication: the product need not fit into 32 bits.

    Ranks from `size` on, which do not count, are in the last bin.
    """
    size = jnp.maximum(size, 1).astype(jnp.uint32)
    rank = jnp.minimum(rank.astype(jnp.uint32), size - 1)
    quotient = remainder = jnp.zeros_like(rank)
    for bit in f"{bins:b}":
        quotient, remainder = 2 * quotient, 2 * remainder
        for more in (0, rank if bit == "1" else 0):
            remainder = remainder + more
            exceeds = remainder >= size
            quotient = quotient + exceeds.astype(jnp.uint32)
            remainder = jnp.where(exceeds, remainder - size, remainder)
    return quotient.astype(jnp.int32)


def bin_counts(chosen: Bool[Array, " n"], index: Integer[Array, " n"], bins: int) -> Array:
    """How many of each bin are chosen."""
    # One bin more: in a batch of one bin whose index is known, XLA for a CPU adds up wrong numbers.
    return jnp.zeros(bins + 1, jnp.int32).at[index].add(chosen.astype(jnp.int32))[:bins]


def number_of_run(x: Shaped[Array, " n"]) -> Integer[Array, " n"]:
    """The number, from 0 on, of the run of equal entries that each entry of an array is in.

    In an array that is sorted NaN comes last: all of them are one run.
    """
    before = jnp.concatenate([x[:1], x[:-1]])
    alike = (x == before) | (before != before)
    return jnp.cumsum(~alike, dtype=jnp.int32)


def share_of_equals(
    x: Float[Array, " n"], chosen: Bool[Array, " n"], counts: Bool[Array, " n"]
) -> Float[Array, " n"]:
    """For each entry of a sorted array, the share of those equal to it that is chosen.

    Only entries that count are looked at; they come first.
    """
    group = number_of_run(x)
    size, number = (bin_counts(y, group, x.shape[0]) for y in (counts, counts & chosen))
    share: Array = number.astype(x.dtype) / jnp.maximum(size, 1).astype(x.dtype)
    return share[group]


def bin_sums(x: Float[Array, "n ..."], index: Integer[Array, " n"], bins: int) -> Array:
    """The sum of each bin, of partial sums: a small number added to a large sum would be lost."""
    number, *rest = x.shape
    parts = max(1, min(_MOST_PARTS, _PARTS_OF_BINS // (bins * math.prod(rest))))
    part = jax.lax.iota(jnp.int32, number) % parts
    return jnp.sum(jnp.zeros((parts, bins, *rest), x.dtype).at[part, index].add(x), 0)
