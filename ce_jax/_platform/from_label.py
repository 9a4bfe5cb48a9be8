"""Exponentials relative to the logit of the row's label, so that a CPU needs no row's maximum.

With `z_y` in place of the maximum, `sum_c exp(z_c - z_y)` is `1 / p_y`. It is at least 1, the
label's own share, so no class that matters underflows, and its logarithm is the cross-entropy, with
all the digits that it has relative to the maximum. It grows with the loss, and with it the
differences `z_c - z_y`, which float32 rounds by half of 2e-6 above 16. So where the loss of a row
exceeds 32 nats, its block of rows, which in a small tile is the tile, is read again relative to
their maxima; and if that shows in the first few rows, the maxima are looked for to begin with.

In rows of a few classes even to subtract a number is dear. There the exponentials are taken of the
logits as they are, and what the others sum up to is divided by the label's, with no difference to
round, so that a loss near 0 has all digits too: unless one is out of range, which sends its block
to the maxima. On two cores that takes 0.6 of optax's time for 65536 rows of 10, where the way by
labels takes 0.78.

That saves one pass over the logits of five: on two cores a quarter of the time for value and
gradient. What has to be read again takes twice the time. A GPU reads a row once for its
maximum and its sum (see `_platform.one_reading`), and nothing would be gained.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .._rows.partial import Attempt, Bare
from .._rows.sums import Columns, are_unrolled, bounded, exp_shifted, origin, shift, sum_exp
from .one_reading import read, read_twice
from .parts import FEW_CLASSES, Shapes, best_shapes, in_long_rows, is_own, row_maxima, sums_in_one
from .unless import mended, unless

# Sums above this are of losses above 31.9 nats.
_MOST = 2.0**46
# Sums of bare exponentials, the inverse of the label's, and their product: all digits below this.
_MOST_BARE = 2.0**100
# Sums above its inverse leave probabilities down to 2^-96 above the smallest normal number.
_MOST_INVERSE = 2.0**30
# One row of so many is looked at first, or of all, if there are fewer.
_SAMPLED = 128
# Where there are fewer rows, the maxima serve: in narrow dtypes they are found as fast.
_FEWEST_ROWS, _FEWEST_NARROW_ROWS = 16, 128
# A tile of fewer elements is read faster by fewer kernels.
_SMALL = 1 << 16
# One of no more is read again as a whole: parts of it are not worth a longer compilation.
_MEDIUM = 1 << 21
# Blocks to read again, at most: one for each bit of an integer.
_BLOCKS = 32


class Found(NamedTuple):
    """The sum of exponentials of each row, relative to `base`, and how it was found."""

    base: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    attempt: Attempt


def is_worth_it(z: Float[Array, "*rows classes"]) -> bool:
    """Whether a tile with whole rows may be faster to read relative to labels."""
    fewest = _FEWEST_ROWS if z.dtype.itemsize >= 4 else _FEWEST_NARROW_ROWS
    if not is_own(z) or z.size < _SMALL or math.prod(z.shape[:-1]) < fewest:
        return False
    return z.shape[-1] <= FEW_CLASSES or not are_unrolled(z)


def at_label(
    x: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The number in the column of each row's label, which is in this tile."""
    return jnp.take_along_axis(x, labels[..., None], axis=-1, mode="promise_in_bounds")[..., 0]


def is_label(
    labels: Integer[Array, "*rows"],
    z: Float[Array, "*rows classes"],
    first_class: int | Integer[Array, ""] = 0,
) -> Bool[Array, "*rows classes"]:
    """True in the column of each row's label, by comparison: a scatter is slow off the CPU."""
    columns = jax.lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    return columns == (labels - first_class)[..., None]


def sums(
    z: Float[Array, "*rows classes"],
    labels: Integer[Array, "*rows"],
    label_logit: Float[Array, "*rows"],
    counts: Bool[Array, "*rows"] | None,
    *,
    shapes: Shapes,
    shared: bool,
) -> Found:
    """The sum of exponentials of each row.

    Args:
      z: the tile, in which rows are whole.
      labels: the label of each row.
      label_logit: the logit of each row's label, in the dtype of the sums.
      counts: whether the row counts; if not, its sum need not be right.
      shapes: those of `parts.best_shapes`.
      shared: whether `exponentials` will be asked for in the same program. They are found along
        whole rows, and so the sums then are too.
    """
    bare = shared and z.shape[-1] <= FEW_CLASSES
    attempted = _attempted_bare if bare else _attempted
    found: Found = jax.lax.platform_dependent(
        z,
        labels,
        label_logit if bare else jax.lax.stop_gradient(label_logit),
        counts,
        cpu=functools.partial(attempted, {} if shared else shapes, shapes),
        default=functools.partial(_by_maxima, shapes, bare),
    )
    return found


def exponentials(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], attempt: Attempt
) -> Float[Array, "*rows classes"]:
    """`exp(z - base)`, which a CPU has in memory already, but for the blocks that were missed."""
    exp: Array = jax.lax.platform_dependent(
        z, base, attempt, cpu=_exp_attempted, default=lambda z, base, _: _exp(z, base)
    )
    return exp


def _exp(z: Float[Array, "*rows classes"], base: Float[Array, "*rows"]) -> Array:
    return exp_shifted(z, origin(base), own_max=True)


def _by_maxima(
    shapes: Shapes, bare: bool, z: Array, labels: Array, label_logit: Array, _: Array | None
) -> Found:
    dtype = label_logit.dtype
    if not bare:
        part = read(shapes, z, Columns(), dtype, stored=False)
        return Found(part.base, part.sum_exp, Attempt(part.base, _nowhere(part.base)))
    # Of the others, which the label's 1 would swallow where a loss is near 0.
    others = jnp.where(is_label(labels, z), -jnp.inf, z)
    part = read(shapes, others, Columns(), dtype, stored=False)
    most, rest = part.base, part.sum_exp
    base = jnp.maximum(most, jax.lax.stop_gradient(label_logit))
    rest = rest * jnp.exp(most - origin(base))
    gap = label_logit - origin(base)
    sums = Bare(jnp.ones_like(rest), rest + jnp.expm1(gap), gap)
    return Found(base, rest + jnp.exp(gap), Attempt(None, _nowhere(base), sums))


def _nowhere(base: Float[Array, "*rows"]) -> Integer[Array, ""]:
    # Like anything found in the rows, it varies over the mesh axes that they vary over.
    return jnp.full_like(jnp.max(base), 0, dtype=jnp.uint32)


def _missed(
    x: Float[Array, "*rows"], limit: float, z: Float[Array, "*rows classes"]
) -> Integer[Array, ""]:
    """The blocks in which some row of the tile has a number that is NaN or not below the limit."""
    count = _block_count(z)
    missed = ~jnp.all(x.reshape(count, -1) < limit, -1)  # a CPU's maximum passes over NaN
    bits = np.left_shift(np.uint32(1), np.arange(count, dtype=np.uint32))
    return jnp.sum(jnp.where(missed, bits, 0), dtype=jnp.uint32)


def _block_count(z: Float[Array, "*rows classes"]) -> int:
    if z.size <= _MEDIUM:
        return 1
    return next(k for k in range(_BLOCKS, 0, -1) if z.shape[0] % k == 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attempted(
    shapes: Shapes,
    shapes_of_maxima: Shapes,
    z: Array,
    _: Array,
    label_logit: Array,
    counts: Array | None,
) -> Found:
    near = _near_in_sample(z, label_logit, counts)
    tried = unless(
        near, label_logit, lambda: row_maxima(z, shapes_of_maxima).astype(label_logit.dtype)
    )
    # Beside a label at -inf the sum becomes infinite, unless all of the row is at -inf.
    total = sum_exp(shapes, z, bounded(tried))
    missed = _missed(_if(counts, total), _MOST, z)

    def again(cut: Callable[[Array], Array]) -> tuple[Array, Array]:
        return _by_own_maxima(cut(z), label_logit.dtype)

    base, total = mended(missed, _block_count(z), (tried, total), again)
    return Found(base, total, Attempt(tried, missed))


def _by_own_maxima(z: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    shapes = best_shapes(z, alone=False, entropy=False)
    part = read_twice(shapes, z, Columns(), dtype=dtype, stored=False)
    return part.base, part.sum_exp


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attempted_bare(
    _: Shapes,
    __: Shapes,
    z: Array,
    labels: Array,
    label_logit: Array,
    counts: Array | None,
) -> Found:
    exp = _bare_exp(z, label_logit.dtype)
    of_label = is_label(labels, z)
    found = sums_in_one({"own": jnp.where(of_label, exp, 0), "rest": jnp.where(of_label, 0, exp)})
    own, rest = found["own"], found["rest"]
    total = own + rest
    most = functools.reduce(
        jnp.maximum, (total, total / own, 1 / own, _MOST_BARE / _MOST_INVERSE / total)
    )
    missed = _missed(_if(counts, most), _MOST_BARE, z)

    def again(cut: Callable[[Array], Array]) -> tuple[Array, Array, Bare]:
        base, total = _by_own_maxima(cut(z), label_logit.dtype)
        # Read here: where it is not needed, a second gather is dear.
        gap = at_label(cut(z), cut(labels)).astype(base.dtype) - origin(base)
        return base, total, Bare(jnp.ones_like(total), total - 1, gap)

    nothing = jnp.zeros_like(total)
    value = (nothing, total, Bare(own, rest, nothing))
    base, total, bare = mended(missed, _block_count(z), value, again)
    return Found(base, total, Attempt(None, missed, bare))


def _bare_exp(z: Array, dtype: jnp.dtype) -> Array:
    return in_long_rows(jnp.exp, z.astype(dtype))


def _near_in_sample(z: Array, label_logit: Array, counts: Array | None) -> Bool[Array, ""]:
    count = -(-label_logit.size // _SAMPLED)
    z, label_logit, counts = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[label_logit.ndim :])[:count], (z, label_logit, counts)
    )
    gaps = jnp.max(z, -1).astype(label_logit.dtype) - label_logit
    return jnp.max(_if(counts, gaps)) < math.log(_MOST)


def _if(counts: Array | None, x: Array) -> Array:
    return x if counts is None else jnp.where(counts, x, 0)


def _jvp_of(attempted: Callable[..., Found]) -> Callable[..., tuple[Found, Found]]:
    def jvp(
        shapes: Shapes,
        shapes_of_maxima: Shapes,
        primals: tuple[Array, Array, Array, Array | None],
        tangents: tuple[Array, Any, Array, Any],
    ) -> tuple[Found, Found]:
        (z, labels, *_), (dz, *_) = primals, tangents
        found = attempted(shapes, shapes_of_maxima, *primals)
        _, slope = jax.jvp(lambda z: sum_exp(shapes, z, origin(found.base)), (z,), (dz,))
        unmoved = jnp.zeros_like(found.base)
        missed: Any = np.zeros(found.attempt.missed.shape, jax.dtypes.float0)
        moved = Attempt(unmoved, missed)
        if found.attempt.bare is not None:
            gap = at_label(dz, labels).astype(unmoved.dtype)
            moved = Attempt(None, missed, Bare(unmoved, slope, gap))
        return found, Found(unmoved, slope, moved)

    return jvp


_attempted.defjvp(_jvp_of(_attempted))
_attempted_bare.defjvp(_jvp_of(_attempted_bare))


@jax.custom_jvp
def _exp_attempted(z: Array, base: Array, attempt: Attempt) -> Array:
    # Written as in the sums, which XLA then takes it from.
    tried = attempt.tried
    first = _bare_exp(z, base.dtype) if tried is None else jnp.exp(shift(z, bounded(tried)))
    return mended(attempt.missed, _block_count(z), first, lambda cut: _exp(cut(z), cut(base)))


@_exp_attempted.defjvp
def _exp_attempted_jvp(
    primals: tuple[Array, Array, Attempt], tangents: tuple[Array, Array, Attempt]
) -> tuple[Array, Array]:
    (z, base, _), (dz, d_base, _) = primals, tangents
    exp = _exp_attempted(*primals)
    _, shifts = jax.jvp(lambda z, base: shift(z, origin(base)), (z, base), (dz, d_base))
    return exp, exp * shifts
