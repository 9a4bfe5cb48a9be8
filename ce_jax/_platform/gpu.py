"""The maximum of a row and the sum of its exponentials in one reading, for a GPU.

One reduction brings both sums to the larger maximum. Its arithmetic hides behind the reading: on an
H200, 8192 rows of 32768 float32 logits took 0.53 of the time of two reductions for the loss, 0.77
for value and gradient (jax 0.11.2, earlier form).

XLA fuses a reduction with two operands only if each has its elements to itself. If they share the
maximum, it stores arrays of the size of the logits. So the maximum of each few numbers is computed
twice, in two orders, which XLA does not recognise as the same. (Milakov and Gimelshein, `Online
normalizer calculation for softmax`, 2018.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rows import tile
from .._rows.dtypes import wide

# So many numbers of a row are brought to their own maximum at once. One by one they take twice the
# time: two exponentials each, for which the next one waits.
_SIDE_BY_SIDE = 8

# A tile of no more a GPU reads from its cache the second time, and nothing would be gained.
CACHED_BYTES = 1 << 23


@jax.custom_jvp
def normaliser(z: Float[Array, "*rows classes"], seen: tile.Seen = None) -> tile.Normaliser:
    """As `tile.normaliser`."""
    dtype = wide(z.dtype)
    width = -(-z.shape[-1] // _SIDE_BY_SIDE)
    missing = [(0, 0)] * (z.ndim - 1) + [(0, _SIDE_BY_SIDE * width - z.shape[-1])]
    z = jnp.pad(z, missing, constant_values=-jnp.inf) if missing[-1][1] else z
    few = [x.astype(dtype) for x in jnp.split(z, _SIDE_BY_SIDE, -1)]
    base = tile.finite_maximum(functools.reduce(jnp.maximum, few[1:] + few[:1]))
    sums = functools.reduce(jnp.add, (jnp.exp(x - base) for x in few))
    parts = (tile.finite_maximum(functools.reduce(jnp.maximum, few)), sums)
    start = tile.no_classes((), dtype)
    found = jax.lax.reduce(parts, start, _joined, (z.ndim - 1,))
    row_max, sum_exp = found if seen is None else _joined(found, (seen, jnp.zeros_like(seen)))
    # For derivatives of the loop over blocks, where `jax.checkpoint` loses the rule below.
    constant = jax.lax.stop_gradient(row_max)
    return constant, sum_exp * jnp.exp(row_max - constant)


def _joined(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    row_max = jnp.maximum(a[0], b[0])
    return row_max, a[1] * jnp.exp(a[0] - row_max) + b[1] * jnp.exp(b[0] - row_max)


def row_sums(summands: dict[str, Array]) -> dict[str, Array]:
    """As `tile.row_sums` of two arrays: one sum, of complex numbers."""
    (one, a), (other, b) = summands.items()
    total = jnp.sum(jax.lax.complex(a, b), -1)
    return {one: total.real, other: total.imag}


@normaliser.defjvp
def _normaliser_jvp(primals: Any, tangents: Any) -> tuple[tile.Normaliser, tile.Normaliser]:
    row_max, sum_exp = normaliser(*primals)
    _, slope = jax.jvp(lambda z: tile.sum_exp(z, row_max), primals[:1], tangents[:1])
    return (row_max, sum_exp), (jnp.zeros_like(row_max), slope)
