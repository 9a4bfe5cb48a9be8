"""Rows in parts, where a CPU reads those faster.

XLA's reductions on a CPU take up to eight times as long for each element where an axis has more
than 2^15 of them (`exp` summed in float32, jax 0.10.2: 0.55 ns up to 32768 classes, 4.5 ns for
50257). The same numbers in shorter axes take what short axes take. Other platforms cut long rows
themselves, and here too get the form that is not cut.

A sum over parts has another shape than the tile has in the pull-back, so XLA shares nothing between
the two: what both need is computed twice, and nothing of the size of the tile is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

_LONGEST = 1 << 15
# Rows from which on a narrow tile is faster without the float32 copy that would be kept.
_LONG_IF_NARROW = 1 << 13
# Parts shorter than this are no faster.
_SHORTEST = 1 << 8
# Rows from which on it pays to look for the part that holds the maximum.
_LONG_TO_SEARCH = 1 << 6


def best_shape(
    z: Float[Array, "*rows classes"], *, alone: bool, entropy: bool
) -> tuple[int, ...] | None:
    """The shape in which a CPU best sums up the rows of a tile; None for the shape it has.

    Its last axis is a row or an equal part of one; a length without a suitable divisor stays whole.

    Args:
      z: the tile.
      alone: whether no derivative will be taken, so that there is nothing to share with one.
      entropy: whether that is asked for, which a narrow tile is widened for in any case.
    """
    if _stays_whole(z):
        return None
    *rows, classes = z.shape
    count = _divisor(classes, -(-classes // _LONGEST))
    if count == 1 and z.dtype.itemsize < 4 and classes >= _LONG_IF_NARROW and not entropy:
        count = _divisor(classes, 2)
    if count == 1 and not (alone and is_tall(z)):
        return None
    parts = math.prod(rows) * count
    stacks = _divisor(parts, -(-parts // _LONGEST))
    stacked = (parts,) if stacks <= 1 else (stacks, parts // stacks)
    return (*stacked, classes // count)


def is_tall(z: Float[Array, "*rows classes"]) -> bool:
    """Whether `best_shape` depends on `alone`, unless the rows are cut: there are many of them."""
    *rows, classes = z.shape
    return not _stays_whole(z) and max(rows, default=1) > _LONGEST and classes >= _SHORTEST


def coefficient_parts(z: Float[Array, "*rows classes"]) -> int:
    """In how many parts a CPU best reads rows that it multiplies by one number per class.

    From two on it takes half the time or less, for any length up to `_LONGEST`, and no longer for
    more. A narrow tile would be widened in memory.
    """
    return 1 if z.dtype.itemsize < 4 or _stays_whole(z) else _divisor(z.shape[-1], 2)


def row_maxima(
    z: Float[Array, "*rows classes"], shape: tuple[int, ...] | None
) -> Float[Array, "*rows"]:
    """The largest logit of each row, found in `best_shape`."""
    if shape is None:
        return jnp.max(z, -1)

    def of_parts(z: Array) -> Array:
        maxima = jnp.max(_cut(z, shape), -1)
        return jnp.max(maxima.reshape(*z.shape[:-1], z.shape[-1] // shape[-1]), -1)

    maxima: Array = jax.lax.platform_dependent(z, cpu=of_parts, default=lambda z: jnp.max(z, -1))
    return maxima


def row_argmax(z: Float[Array, "*rows classes"]) -> Integer[Array, "*rows"]:
    """The first class with the largest logit of each row.

    A CPU compares numbers one by one to find where the largest is, and many at once to find what it
    is. So it first looks for the part of the row that holds it: 4 to 20 times as fast.
    """

    def of_rows(z: Array) -> Array:
        return jnp.argmax(z, -1).astype(jnp.int32)

    count = 1 if _stays_whole(z) else _divisor_nearest_root(z.shape[-1])
    if count == 1 or z.shape[-1] < _LONG_TO_SEARCH:
        return of_rows(z)

    def of_parts(z: Array) -> Array:
        parts = z.reshape(*z.shape[:-1], count, z.shape[-1] // count)
        part = of_rows(jnp.max(parts, -1))
        best = jnp.take_along_axis(parts, part[..., None, None], -2)[..., 0, :]
        return part * best.shape[-1] + of_rows(best)

    largest: Array = jax.lax.platform_dependent(
        jax.lax.stop_gradient(z), cpu=of_parts, default=of_rows
    )
    return largest


def in_parts(
    sums_of: Callable[..., dict[str, Array]],
    shape: tuple[int, ...] | None,
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    target: Any,
) -> dict[str, Array]:
    """`sums_of(z, base, target)`, which adds up over the classes, found in `best_shape`.

    The arrays in `target` have the shape of `z` or none.
    """
    if shape is None:
        return sums_of(z, base, target)

    def of_parts(z: Array, base: Array, target: Any) -> dict[str, Array]:
        count = z.shape[-1] // shape[-1]
        repeated = jnp.repeat(base.reshape(-1), count).reshape(shape[:-1])
        target = jax.tree.map(lambda x: _cut(x, shape) if x.ndim else x, target)
        found = sums_of(_cut(z, shape), repeated, target)
        rows = (*base.shape, count)
        return {name: jnp.sum(x.reshape(rows), -1) for name, x in found.items()}

    found: dict[str, Array] = jax.lax.platform_dependent(
        z, base, target, cpu=of_parts, default=sums_of
    )
    return found


def _cut(x: Float[Array, "*rows classes"], shape: tuple[int, ...]) -> Float[Array, "*parts width"]:
    # XLA would move what is done to the parts, such as a conversion, ahead of the cut.
    cut: Array = jax.lax.optimization_barrier(x.reshape(shape))
    return cut


def _stays_whole(z: Array) -> bool:
    # To cut an axis that JAX knows to be sharded moves data, and a symbolic one has no divisors.
    sharded = any(axis is not None for axis in jax.typeof(z).sharding.spec)
    return sharded or not all(isinstance(size, int) for size in z.shape)


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of `n` not below `least` that leaves some length, or 1."""
    return next((k for k in range(max(least, 1), n // _SHORTEST + 1) if n % k == 0), 1)


def _divisor_nearest_root(n: int) -> int:
    """The largest divisor of `n` up to its square root."""
    return next((k for k in range(math.isqrt(n), 1, -1) if n % k == 0), 1)
