"""Sums over the classes of a tile in which 0 may meet -inf, and counts for nothing.

A select keeps the two apart, and to a CPU it is dear: XLA computes a sum there together with the
arithmetic that feeds it, but not with a select, and stores an array of the size of the tile first.
So a CPU first finds the sums without selects, and those with them only where the first came out
infinite or NaN; for a small tile it is not worth that. Other platforms fuse selects like anything
else, and begin with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._parts import FEW_CLASSES, Shapes, apart, coefficient_parts, in_parts, reduced, sums_in_one

# A tile of fewer elements is read with selects at once: a CPU stores little then, and has less to
# compile and to start.
_SMALL = 1 << 11

# Fields of `_tile.Partial`, and how to compute each.
_Sums = dict[str, Callable[[], Array]]


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
    masked: bool,
    shapes: Shapes,
) -> dict[str, Any]:
    """The sums of `_tile.Partial` that `target` and `entropy` ask for.

    They are relative to `base`, the `origin` of each row. `masked` says whether some `z` may be
    -inf, `shapes` are those of `_parts.best_shapes`.
    """
    dots = functools.partial(_dots, entropy, masked)
    if target.probs is None and target.classes is None and not entropy:
        return {"sum_exp": sum_exp(shapes, z, base)}
    if target.classes is not None and target.classes.ndim:
        # A CPU would first store them for each row, to cut them like the tile.
        cheap = {platform: shape for platform, shape in shapes.items() if platform != "cpu"}
        return {"sum_exp": sum_exp(shapes, z, base)} | in_parts(dots, cheap, z, base, target)
    exp = functools.partial(_sum_exp, row_sum)
    found = in_parts(lambda *tile: exp(*tile) | dots(*tile), shapes, z, base, target)
    if target.classes is not None:
        found["classes_sum"] = target.classes * found["classes_count"]
    return found


def sum_exp(
    shapes: Shapes,
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    *,
    stored: bool = True,
) -> Float[Array, "*rows"]:
    """The first of the `sums`, that of the exponentials; `stored` says whether those may be."""
    of_parts = functools.partial(_sum_exp, row_sum if stored else _reduced_sum)
    return in_parts(of_parts, shapes, z, base, None)["sum_exp"]


def _sum_exp(
    add_up: Callable[[Array], Array],
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    _: Any,
) -> dict[str, Array]:
    return {"sum_exp": add_up(jnp.exp(shift(z, base)))}


def _dots(
    entropy: bool,
    masked: bool,
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    target: _Target,
) -> dict[str, Array]:
    if masked:
        cpu: Callable[..., dict[str, Array]] = functools.partial(_select_where_masked, entropy)
        default = _all(functools.partial(_with_select, entropy))
        if all(isinstance(n, int) for n in z.shape) and z.size < _SMALL:  # may be symbolic
            return default(z, base, target)
    else:
        cpu = _all(functools.partial(_without_select, entropy, apart))
        default = _all(functools.partial(_without_select, entropy, lambda x: x))
    found: dict[str, Array] = jax.lax.platform_dependent(z, base, target, cpu=cpu, default=default)
    return found


def _all(sums_of: Callable[..., _Sums]) -> Callable[..., dict[str, Array]]:
    return lambda *arguments: {name: find() for name, find in sums_of(*arguments).items()}


def _with_select(
    entropy: bool, z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], target: _Target
) -> _Sums:
    def target_dot() -> Array:
        shifted = shift(z, base)
        bounded = jnp.maximum(shifted, jnp.finfo(shifted.dtype).min)
        probs = target.probs.astype(shifted.dtype)
        return row_sum(probs * jnp.where(probs == 0, bounded, shifted))

    def exp_dot() -> Array:
        shifted = shift(z, base)
        return row_sum(jnp.exp(shifted) * finite_part(shifted))

    out: _Sums = {}
    if target.probs is not None:
        out["target_dot"] = target_dot
        out["target_sum"] = lambda: row_sum(target.probs.astype(base.dtype))
    if target.classes is not None:
        for name, summand in _of_allowed(z, base, target.classes).items():
            out[name] = functools.partial(lambda find: row_sum(find()), summand)
    if entropy:
        out["exp_dot"] = exp_dot
    return out


def _of_allowed(
    z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], classes: Array
) -> _Sums:
    """What is added up over the classes with `z > -inf`, for each class of each row."""

    def product() -> Array:
        of_all = jnp.broadcast_to(classes, z.shape) * finite_part(shift(z, base))
        return jnp.where(z > -jnp.inf, of_all, 0)  # a weight may be NaN there

    out: _Sums = {"classes_dot": product}
    out["classes_count"] = lambda: (z > -jnp.inf).astype(base.dtype)
    if classes.ndim:
        # By another comparison: a GPU would store the mask if this used it too.
        of_rows = jnp.broadcast_to(classes, z.shape)
        out["classes_sum"] = lambda: jnp.where(z != -jnp.inf, of_rows, 0)
    return out


def _without_select(
    entropy: bool,
    own: Callable[[Array], Array],
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    target: _Target,
) -> _Sums:
    # `own(x)` stands for `x` in one of the sums. What XLA finds in several of them it computes once
    # and stores, while a CPU is faster if each sum reads the tile and computes what it needs.
    def shifted() -> Array:
        return shift(own(z), own(base))

    def classes_dot() -> Array:
        if target.classes.ndim == 0:
            return target.classes * row_sum(shifted())
        count = coefficient_parts(z)
        if count == 1:
            return row_sum(jnp.broadcast_to(own(target.classes), z.shape) * shifted())
        parts = own(z).reshape(*z.shape[:-1], count, z.shape[-1] // count)
        bases = jnp.broadcast_to(own(base)[..., None], parts.shape[:-1])
        classes = own(target.classes)
        classes = classes.reshape(*classes.shape[:-1], *parts.shape[-2:])
        product = jnp.broadcast_to(classes, parts.shape) * shift(parts, bases)
        return jnp.sum(product, (-2, -1))

    def in_all_rows(x: ArrayLike) -> Array:
        # The maximum of a tile varies over the mesh axes that the tile varies over, as a sum must.
        return jnp.full_like(jnp.max(z, -1), x, dtype=base.dtype)

    out: _Sums = {}
    if target.probs is not None:
        out["target_dot"] = lambda: row_sum(own(target.probs).astype(base.dtype) * shifted())
        out["target_sum"] = lambda: row_sum(target.probs.astype(base.dtype))
    if target.classes is not None:
        out["classes_dot"] = classes_dot
        out["classes_count"] = lambda: in_all_rows(z.shape[-1])
        if target.classes.ndim:
            out["classes_sum"] = lambda: in_all_rows(jnp.sum(target.classes, -1))
    if entropy:
        # 0 times a bounded number: right for -inf too, which unmasked logits overflow to.
        least = float(jnp.finfo(base.dtype).min)
        out["exp_dot"] = lambda: row_sum(jnp.exp(shift(z, base)) * jnp.maximum(shifted(), least))
    return out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _select_where_masked(
    entropy: bool, z: Float[Array, "*rows classes"], base: Float[Array, "*rows"], target: _Target
) -> dict[str, Array]:
    with_select = _with_select(entropy, z, base, target)
    found = _all(_without_select)(entropy, apart, z, base, target)
    dots: Any = sum(
        found[name] for name in ("target_dot", "classes_dot", "exp_dot") if name in found
    )
    # One kernel less than `all`; finite numbers that add up to infinity cost time alone. Apart, or
    # XLA would add up the whole tile a second time.
    hold = jnp.isfinite(jnp.sum(apart(dots)))
    for name in ("target_dot", "exp_dot"):  # in turns, so that no two arrays are held at once
        if name in found:
            found[name] = jax.lax.cond(hold, lambda plain=found[name]: plain, with_select[name])
    if target.classes is not None:
        plain = {name: x for name, x in found.items() if name.startswith("classes_")}
        found |= jax.lax.cond(
            hold, lambda: plain, lambda: sums_in_one(_all(_of_allowed)(z, base, target.classes))
        )
    return found


# The derivative of sums that are not taken, times 0, would be NaN.
@_select_where_masked.defjvp
def _select_where_masked_jvp(
    entropy: bool, primals: Any, tangents: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    return jax.jvp(_all(functools.partial(_with_select, entropy)), primals, tangents)


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


def finite_part(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, with 0 for -inf."""
    return jnp.where(x == -jnp.inf, 0, x)


def spread(
    classes: Float[ArrayLike, "..."], z: Float[Array, "*rows classes"], masked: bool
) -> tuple[Float[Array, "*rows classes"], Bool[Array, "*rows classes"]]:
    """The class coefficients in each row, 0 where a class is not allowed, and which are."""
    classes = jnp.broadcast_to(classes, z.shape)
    if not masked:
        return classes, jnp.ones(z.shape, bool)
    allowed = z > -jnp.inf
    return jnp.where(allowed, classes, 0), allowed
