"""The maximum of a row and the sums relative to it, for which a GPU reads it once.

As several reductions they take two readings. As one reduction, which moves all sums to the larger
maximum, they take one, and more arithmetic, which hides behind it: for 8192 rows of 32768 float32
logits on an H200 0.53 of the time of the loss, and 0.77 of that of value and gradient. Smoothing
took 1.28 of optax's time with 2048 rows of 131072, and takes 0.77.

XLA reads many operands together only if each has its elements to itself. Where two share the
maximum that they are relative to, it stores arrays of the size of the logits, as it does for a TPU
in any case: so there the sums are found one by one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rows.partial import Partial, merge
from .._rows.sums import Columns, in_rows, origin, summands, sums
from .parts import Shapes, is_own, row_maxima

# So many numbers of a row are brought to their own maximum at once. Joined one by one they would
# take two exponentials each, and the next one would wait for them: twice the time.
_SIDE_BY_SIDE = 8
# A tile of no more bytes a GPU reads from its cache the second time, and nothing would be gained.
_CACHED = 1 << 23
# The coefficient of every class while sums are moved: no sum of so small ones overflows.
_UNIT = 2.0**-32


def read(
    shapes: Shapes,
    z: Float[Array, "*rows classes"],
    columns: Columns,
    dtype: jnp.dtype,
    *,
    entropy: bool = False,
    stored: bool = True,
) -> Partial:
    """The largest logit of each row, and the `sums.sums` relative to its `origin`.

    `shapes` are those of `parts.best_shapes`, `dtype` that of the sums.
    """
    twice = functools.partial(read_twice, shapes, dtype=dtype, entropy=entropy, stored=stored)
    if not is_own(z) or z.size * z.dtype.itemsize <= _CACHED:
        return twice(z, columns)
    once = functools.partial(_read_once, shapes.get("cuda"), dtype, entropy)
    part: Partial = jax.lax.platform_dependent(z, columns, cuda=once, default=twice)
    # Or devices would join slopes of maxima, all 0.
    return part._replace(base=jax.lax.stop_gradient(part.base))


def read_twice(
    shapes: Shapes,
    z: Float[Array, "*rows classes"],
    columns: Columns,
    *,
    dtype: jnp.dtype,
    entropy: bool = False,
    stored: bool,
) -> Partial:
    """The same by two readings, as all but a GPU with a large tile find it."""
    base = row_maxima(z, shapes).astype(dtype)
    options = {"entropy": entropy, "own_max": True, "stored": stored}
    return Partial(base, **sums(z, origin(base), columns, shapes=shapes, **options))


def _read_once(
    shape: tuple[int, ...] | None,
    dtype: jnp.dtype,
    entropy: bool,
    z: Float[Array, "*rows classes"],
    columns: Columns,
) -> Partial:
    same = columns.classes
    if same is None or same.ndim:
        return _at_once(shape, dtype, entropy, z, columns)
    # The coefficient of all classes is no constant, which what moves the sums has to be made of.
    unit = columns._replace(classes=jnp.array(_UNIT, dtype))
    part = _at_once(shape, dtype, entropy, z, unit)
    count, dot = part.classes_sum / _UNIT, same.astype(dtype) / _UNIT * part.classes_dot
    return part._replace(classes_count=count, classes_sum=same * count, classes_dot=dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _at_once(
    shape: tuple[int, ...] | None,
    dtype: jnp.dtype,
    entropy: bool,
    z: Float[Array, "*rows classes"],
    columns: Columns,
) -> Partial:
    """As in Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"."""
    tile = (z, in_rows(columns, z))
    cut = shape is not None and shape[-1] % _SIDE_BY_SIDE == 0
    if not cut:
        return _merged(_side_by_side(dtype, entropy, *tile))
    parts = jax.tree.map(lambda x: x.reshape(shape) if x.ndim else x, tile)
    found = _merged(_side_by_side(dtype, entropy, *parts))
    return _merged(jax.tree.map(lambda x: x.reshape(*z.shape[:-1], -1), found))


def _side_by_side(
    dtype: jnp.dtype, entropy: bool, z: Float[Array, "*rows classes"], columns: Columns
) -> Partial:
    """The sums of eight numbers of a row each."""
    width = -(-z.shape[-1] // _SIDE_BY_SIDE)
    starts = range(0, z.shape[-1], width)
    logits = [_from(z, start, width, -jnp.inf).astype(dtype) for start in starts]
    weights = [
        jax.tree.map(lambda x, start=start: _from(x, start, width, 0.0) if x.ndim else x, columns)
        for start in starts
    ]

    def largest(turn: int) -> Array:
        """The maximum, found in an order of its own, so that XLA does not know it from others."""
        return functools.reduce(jax.lax.max, logits[turn:] + logits[:turn])

    found: dict[str, Any] = {}
    for turn, (name, of) in enumerate(summands(columns, entropy=entropy).items(), 1):
        base, traced_once = origin(largest(turn)), jax.jit(of)
        each = (traced_once(x, base, w) for x, w in zip(logits, weights, strict=True))
        found[name] = functools.reduce(jax.lax.add, each)
    if columns.classes is not None and not columns.classes.ndim:
        found["classes_sum"] = _UNIT * found.pop("classes_count")
    return Partial(largest(0), **found)


def _from(x: Float[Array, "*rows classes"], start: int, width: int, fill: float) -> Array:
    stop = min(start + width, x.shape[-1])
    some = jax.lax.slice_in_dim(x, start, stop, axis=-1)
    missing = [(0, 0)] * (x.ndim - 1) + [(0, start + width - stop)]
    return jnp.pad(some, missing, constant_values=fill) if missing[-1][1] else some


def _merged(parts: Partial) -> Partial:
    nothing = jax.tree.map(lambda x: jnp.zeros((), x.dtype), parts)
    nothing = nothing._replace(base=jnp.full((), -jnp.inf, parts.base.dtype))
    whole: Partial = jax.lax.reduce(parts, nothing, merge, (parts.base.ndim - 1,))
    return whole


@_at_once.defjvp
def _at_once_jvp(
    shape: tuple[int, ...] | None,
    dtype: jnp.dtype,
    entropy: bool,
    primals: tuple[Array, Columns],
    tangents: tuple[Array, Columns],
) -> tuple[Partial, Partial]:
    part = _at_once(shape, dtype, entropy, *primals)
    shapes = {} if shape is None else {"cuda": shape}

    def relative(z: Array, columns: Columns) -> Partial:
        found = sums(z, origin(part.base), columns, entropy=entropy, shapes=shapes, own_max=False)
        if part.classes_count is None:
            found.pop("classes_count", None)
        return Partial(part.base, **found)

    _, slope = jax.jvp(relative, primals, tangents)
    return part, slope
