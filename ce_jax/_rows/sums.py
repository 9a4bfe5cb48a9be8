"""Sums over the classes of a tile in which 0 may meet -inf, and counts for nothing.

A select keeps the two apart. To a CPU it would be dear: XLA finds a sum there together with the
arithmetic that feeds it, but not with a select, and stores an array of the size of the tile first.
So a CPU finds two sums or more of what is selected at once (see `parts.sums_in_one`), which XLA
compiles in another way. Other platforms fuse selects like anything else.

Exponentials relative to the maximum of a row of 9 to 32 numbers LLVM unrolls, for code that is slow
and takes long to compile. One of XLA's own kernels finds maximum, difference and exponential at
once: 0.44 ms with their sum for 0.64 (65536 rows of 10), and 0.47 for 0.81 (32768 rows of 32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from .._platform.parts import FEW_CLASSES, Shapes, apart, in_parts, is_own, reduced, sums_in_one

_UNROLLED_ROWS = range(9, 33)


class Columns(NamedTuple):
    """What every class of a row is weighted with: `probs` and `classes` of a `tile.Target`."""

    probs: Any = None
    classes: Any = None


# What is added up over the classes: of each logit, what that is relative to and `Columns`.
Summand = Callable[[Array, Array, Columns], Array]


def sums(
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    columns: Columns,
    *,
    entropy: bool,
    shapes: Shapes,
    own_max: bool,
    stored: bool = True,
) -> dict[str, Any]:
    """The sums of `partial.Partial` that `columns` and `entropy` ask for.

    They are relative to `base`, the `origin` of each row. `shapes` are those of
    `parts.best_shapes`; `own_max` is for `exp_shifted`, `stored` for `sum_exp`.
    """
    # A CPU reads long rows as fast where it finds several sums of them.
    others = {platform: shape for platform, shape in shapes.items() if platform != "cpu"}
    if entropy:
        found = in_parts(functools.partial(_sums_of_exp, own_max), others, z, base, None)
    else:
        found = {"sum_exp": sum_exp(shapes, z, base, own_max=own_max, stored=stored)}
    if columns.probs is not None or columns.classes is not None:
        found |= in_parts(_sums_of_columns, others, z, base, columns)
    if columns.classes is not None and columns.classes.ndim == 0:
        found["classes_sum"] = columns.classes * found["classes_count"]
    return found


def sum_exp(
    shapes: Shapes,
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    *,
    own_max: bool = False,
    stored: bool = True,
) -> Float[Array, "*rows"]:
    """The first of the `sums`, that of `exp_shifted`; `stored` says whether those may be."""
    add_up = row_sum if stored else _reduced_sum

    def of_parts(z: Array, base: Array, _: Any) -> dict[str, Array]:
        return {"sum_exp": add_up(exp_shifted(z, base, own_max=own_max))}

    return in_parts(of_parts, shapes, z, base, None)["sum_exp"]


def exp_shifted(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], *, own_max: bool
) -> Float[Array, "*rows classes"]:
    """`exp(z - base)`; `own_max` says that `base` is the `origin` of the tile's own maxima.

    It is a constant then, and found anew where a CPU gets its exponentials from one kernel.
    """

    def relative(z: Array, base: Array) -> Array:
        return jnp.exp(shift(z, base))

    if not own_max or not are_unrolled(z):
        return relative(z, base)

    def in_one_kernel(z: Array, base: Array) -> Array:
        # Found for this alone, and without a select, or there would be several kernels.
        maxima = jnp.max(apart(jax.lax.stop_gradient(z)), -1)
        return relative(z, bounded(maxima.astype(base.dtype)))

    found: Array = jax.lax.platform_dependent(z, base, cpu=in_one_kernel, default=relative)
    return found


def are_unrolled(z: Float[Array, "*rows classes"]) -> bool:
    """Whether a CPU finds `exp_shifted` relative to maxima by one of XLA's own kernels."""
    return is_own(z) and z.shape[-1] in _UNROLLED_ROWS


def in_rows(columns: Columns, z: Float[Array, "*rows classes"]) -> Columns:
    """The same for each row; a number for all classes stays one."""
    spread_out: Columns = jax.tree.map(
        lambda x: jnp.broadcast_to(x, z.shape) if x.ndim else x, columns
    )
    return spread_out


def summands(columns: Columns, *, entropy: bool) -> dict[str, Summand]:
    """What `sums` adds up; of a scalar `columns.classes` the count of the classes it is for."""
    found: dict[str, Summand] = {"sum_exp": _exp}
    if entropy:
        found["exp_dot"] = _exp_dot
    return found | _of_probs(columns) | _of_allowed(columns)


def _of_probs(columns: Columns) -> dict[str, Summand]:
    if columns.probs is None:
        return {}
    return {"target_dot": _target_dot, "target_sum": _target_sum}


def _of_allowed(columns: Columns) -> dict[str, Summand]:
    if columns.classes is None:
        return {}
    found: dict[str, Summand] = {"classes_dot": _classes_dot, "classes_count": _classes_count}
    return found | ({"classes_sum": _classes_sum} if columns.classes.ndim else {})


def _exp(z: Array, base: Array, _: Columns) -> Array:
    return jnp.exp(_relative(z, base))


def _exp_dot(z: Array, base: Array, columns: Columns) -> Array:
    return _times_exponent(_exp(z, base, columns), _relative(z, base))


def _times_exponent(exp: Array, shifted: Array) -> Array:
    return exp * finite_exponent(shifted)


def _target_dot(z: Array, base: Array, columns: Columns) -> Array:
    probs = _target_sum(z, base, columns)
    least = jnp.where(probs == 0, jnp.finfo(probs.dtype).min, -jnp.inf)
    return probs * jnp.maximum(_relative(z, base), least)


def _target_sum(_: Array, base: Array, columns: Columns) -> Array:
    probs: Array = columns.probs.astype(base.dtype)
    return probs


def _classes_dot(z: Array, base: Array, columns: Columns) -> Array:
    dot = columns.classes * bounded(_relative(z, base))  # may be 0 times what overflowed
    return jnp.where(z > -jnp.inf, dot, 0)  # a coefficient may be NaN there


# By another comparison: a GPU would store the mask if all used one.
def _classes_count(z: Array, base: Array, _: Columns) -> Array:
    return (z != -jnp.inf).astype(base.dtype)


def _classes_sum(z: Array, _: Array, columns: Columns) -> Array:
    return jnp.where(z != -jnp.inf, columns.classes, 0)


def _sums_of_exp(
    own_max: bool, z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], _: Any
) -> dict[str, Array]:
    exp = exp_shifted(z, base, own_max=own_max)
    return _row_sums({"sum_exp": exp, "exp_dot": _times_exponent(exp, shift(z, base))})


def _sums_of_columns(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], columns: Columns
) -> dict[str, Array]:
    # Apart, or a CPU would store the difference for these sums and that of exponentials.
    base = apart(base)[..., None]
    columns = in_rows(columns, z)
    found: dict[str, Array] = {}
    for some in filter(None, (_of_probs(columns), _of_allowed(columns))):
        found |= _row_sums({name: of(z, base, columns) for name, of in some.items()})
    return found


def _row_sums(elements: dict[str, Array]) -> dict[str, Array]:
    def each(elements: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(_reduced_sum, elements)

    found: dict[str, Array] = jax.lax.platform_dependent(elements, cpu=sums_in_one, default=each)
    return found


def origin(row_max: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What is subtracted from a row: its maximum, unless that would give -inf - -inf."""
    return jnp.where(row_max == -jnp.inf, 0, row_max)


def shift(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """The tile relative to the `origin` of its rows, in the dtype of that."""
    return _relative(z, base[..., None])


def _relative(z: Float[Array, "*rows classes"], base: Float[Array, "*rows #classes"]) -> Array:
    return z.astype(base.dtype) - base


def row_sum(x: Float[Array, "*rows classes"]) -> Float[Array, "*rows"]:
    """The sum over the classes; a CPU sums a few of them twice as fast by a matrix product."""
    sharding = jax.typeof(x).sharding.spec
    sharded = sharding and sharding[-1] is not None  # no product of a sharded axis without advice
    few = isinstance(x.shape[-1], int) and x.shape[-1] <= FEW_CLASSES  # may be symbolic
    if not few or x.dtype != jnp.float32 or sharded:
        return _reduced_sum(x)

    def product(x: Array) -> Array:
        return jnp.matmul(x, jnp.ones(x.shape[-1:], x.dtype), precision="highest")

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, -1))


def _reduced_sum(x: Float[Array, "*rows classes"]) -> Float[Array, "*rows"]:
    return reduced(jnp.sum, jnp.add, x)


def finite_exponent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, or a finite number of which the exponential is 0 as well."""
    return jnp.maximum(x, -1e4)  # with a larger one a derivative of 0 times it would overflow


def bounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, with the least finite number for -inf, which unmasked logits may overflow to."""
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


def spread(
    classes: Float[ArrayLike, "..."], z: Float[Array, "*rows classes"]
) -> tuple[Float[Array, "*rows classes"], Bool[Array, "*rows classes"]]:
    """The class coefficients in each row, 0 where a class is not allowed, and which are."""
    classes = jnp.broadcast_to(classes, z.shape)
    allowed = z > -jnp.inf
    return jnp.where(allowed, classes, 0), allowed
