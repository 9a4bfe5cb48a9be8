"""The maximum of a row and the sum of exponentials relative to it, for which a GPU reads it once.

As two reductions they take two readings. As one reduction of pairs, which moves both sums to the
larger maximum, they take one, and more arithmetic, which hides behind it: for 8192 rows of 32768
float32 logits on an H200 0.53 of the time of the loss, and 0.77 of that of value and gradient.
With other sums in the same reduction XLA stores arrays of the size of the logits, as it does for a
TPU with these two, so there they are found one by one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._parts import Shapes, is_own, row_maxima
from ._sums import origin, sum_exp

# So many numbers of a row are brought to their own maximum at once. Joined one by one they would
# take two exponentials each, and the next one would wait for them: twice the time.
_SIDE_BY_SIDE = 8


def maxima_and_sums(
    shapes: Shapes, z: Float[Array, "*rows classes"], dtype: jnp.dtype, *, stored: bool = True
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The largest logit of each row, and the sum of exponentials relative to its `origin`.

    `shapes` are those of `_parts.best_shapes`; `stored` is for `_sums.sum_exp`.
    """
    twice = functools.partial(one_by_one, shapes, dtype=dtype, stored=stored)
    if not is_own(z) or not z.size:
        return twice(z)
    once = functools.partial(_at_once, shapes.get("cuda"), dtype)
    base, total = jax.lax.platform_dependent(z, cuda=once, default=twice)
    return jax.lax.stop_gradient(base), total  # or devices would join slopes of maxima, all 0


def one_by_one(
    shapes: Shapes, z: Float[Array, "*rows classes"], dtype: jnp.dtype, *, stored: bool
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The same by two readings, for what no GPU runs."""
    base = row_maxima(z, shapes).astype(dtype)
    return base, sum_exp(shapes, z, origin(base), own_max=True, stored=stored)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _at_once(
    shape: tuple[int, ...] | None, dtype: jnp.dtype, z: Float[Array, "*rows classes"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """As in Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"."""
    cut = shape is not None and shape[-1] % _SIDE_BY_SIDE == 0
    beside = [x.astype(dtype) for x in _side_by_side(z.reshape(shape) if cut else z)]
    base = functools.reduce(jnp.maximum, beside)
    zero = origin(base)
    total = functools.reduce(jnp.add, (jnp.exp(x - zero) for x in beside))
    found = _joined(base, total)
    if not cut:
        return found
    base, total = (x.reshape(*z.shape[:-1], -1) for x in found)
    return _joined(base, total)


def _side_by_side(x: Float[Array, "*rows classes"]) -> list[Array]:
    classes = x.shape[-1]
    width = -(-classes // _SIDE_BY_SIDE)
    parts = [x[..., i : i + width] for i in range(0, classes, width)]
    missing = [(0, 0)] * (x.ndim - 1) + [(0, width - parts[-1].shape[-1])]
    return [*parts[:-1], jnp.pad(parts[-1], missing, constant_values=-jnp.inf)]


def _joined(
    base: Float[Array, "*rows n"], total: Float[Array, "*rows n"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    nothing = (jnp.full((), -jnp.inf, base.dtype), jnp.zeros((), total.dtype))
    found: tuple[Array, Array] = jax.lax.reduce((base, total), nothing, _join, (base.ndim - 1,))
    return found


def _join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    base = jnp.maximum(a[0], b[0])
    zero = origin(base)
    of_a, of_b = (total * jnp.exp(old - zero) for old, total in (a, b))
    return base, of_a + of_b


@_at_once.defjvp
def _at_once_jvp(
    shape: tuple[int, ...] | None, dtype: jnp.dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    base, total = _at_once(shape, dtype, *primals)
    shapes = {} if shape is None else {"cuda": shape}
    _, slope = jax.jvp(lambda z: sum_exp(shapes, z, origin(base)), primals, tangents)
    return (base, total), (jnp.zeros_like(base), slope)
