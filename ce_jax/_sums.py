"""Sums over the classes of a tile in which 0 may meet -inf, and counts for nothing.

A select keeps the two apart. To a CPU it would be dear: XLA finds a sum there together with the
arithmetic that feeds it, but not with a select, and stores an array of the size of the tile first.
So a CPU finds two sums or more of what is selected at once (see `_parts.sums_in_one`), which XLA
compiles in another way. Other platforms fuse selects like anything else.

Exponentials relative to the maximum of a row of 9 to 32 numbers LLVM unrolls, for code that is slow
and takes long to compile. One of XLA's own kernels finds maximum, difference and exponential at
once: 0.44 ms with their sum for 0.64 (65536 rows of 10), and 0.47 for 0.81 (32768 rows of 32).
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._parts import FEW_CLASSES, Shapes, apart, in_parts, is_own, reduced, sums_in_one

_UNROLLED_ROWS = range(9, 33)


@runtime_checkable
class _Target(Protocol):
    """What is read of a `_tile.Target`; each part may be None."""

    @property
    def probs(self) -> Any: ...
    @property
    def classes(self) -> Any: ...


def sums(
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    target: _Target,
    *,
    entropy: bool,
    shapes: Shapes,
    own_max: bool,
) -> dict[str, Any]:
    """The sums of `_tile.Partial` that `target` and `entropy` ask for.

    They are relative to `base`, the `origin` of each row. `shapes` are those of
    `_parts.best_shapes`; `own_max` is for `exp_shifted`.
    """
    # A CPU reads long rows as fast where it finds several sums of them.
    others = {platform: shape for platform, shape in shapes.items() if platform != "cpu"}
    if entropy:
        found = in_parts(functools.partial(_of_exp, own_max), others, z, base, None)
    else:
        found = {"sum_exp": sum_exp(shapes, z, base, own_max=own_max)}
    if target.probs is not None or target.classes is not None:
        found |= in_parts(_of_target, others, z, base, target)
    if target.classes is not None and target.classes.ndim == 0:
        found["classes_sum"] = target.classes * found["classes_count"]
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


def _of_exp(
    own_max: bool, z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], _: Any
) -> dict[str, Array]:
    exp = exp_shifted(z, base, own_max=own_max)
    return _row_sums({"sum_exp": exp, "exp_dot": exp * finite_exponent(shift(z, base))})


def _of_target(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], target: _Target
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    # Apart, or a CPU would store the difference for these sums and that of exponentials.
    shifted = shift(z, apart(base))
    if target.probs is not None:
        probs = target.probs.astype(base.dtype)
        dot = probs * jnp.where(probs == 0, bounded(shifted), shifted)
        found |= _row_sums({"target_dot": dot, "target_sum": probs})
    if target.classes is not None:
        found |= _row_sums(_of_allowed(z, shifted, target.classes))
    return found


def _of_allowed(
    z: Float[Array, "*rows classes"], shifted: Float[Array, "*rows classes"], classes: Array
) -> dict[str, Array]:
    """What is added up over the classes with `z > -inf`."""
    allowed = z > -jnp.inf
    of_rows = jnp.broadcast_to(classes, z.shape)
    dot = of_rows * bounded(shifted)  # a coefficient may be 0 where that overflowed
    summands = {
        "classes_dot": jnp.where(allowed, dot, 0),  # a coefficient may be NaN there
        "classes_count": allowed.astype(shifted.dtype),
    }
    if classes.ndim:
        # By another comparison: a GPU would store the mask if this used it too.
        summands["classes_sum"] = jnp.where(z != -jnp.inf, of_rows, 0)
    return summands


def _row_sums(summands: dict[str, Array]) -> dict[str, Array]:
    def each(summands: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(_reduced_sum, summands)

    found: dict[str, Array] = jax.lax.platform_dependent(summands, cpu=sums_in_one, default=each)
    return found


def origin(row_max: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What is subtracted from a row: its maximum, unless that would give -inf - -inf."""
    return jnp.where(row_max == -jnp.inf, 0, row_max)


def shift(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """The tile relative to the `origin` of its rows, in the dtype of that."""
    return z.astype(base.dtype) - base[..., None]


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
