"""Row statistics when the classes are spread over the devices of a mesh axis.

`axis_name` is None throughout where they are not. Inside `jax.shard_map` JAX tracks over which mesh
axes a value varies; a derivative rule of our own is right only if all that enters it varies over
the same axes, so `align` casts what does not. JAX's derivative of that cast is the sum over devices
that, say, the gradient of a replicated `hidden` needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer

from .tile import NOWHERE, Partial, share_of

_Tree = TypeVar("_Tree")

# What JAX's versions call by different names. When the oldest supported version behaves like the
# newest, remove the choice.

_SINCE_0_9 = hasattr(jax, "reshard")
reshard = jax.reshard if _SINCE_0_9 else jax.sharding.reshard


def varying(x: Array) -> frozenset[Any]:
    """The axes of `jax.shard_map` over which, to JAX, `x` varies."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # before jax 0.10


def psum(tree: _Tree, axes: str | tuple[str, ...]) -> _Tree:
    """The sums over devices of several arrays, not all of which need have a derivative."""
    if _SINCE_0_9:
        return jax.lax.psum(tree, axes)
    # Before jax 0.9 the transpose of one sum of several arrays wants the derivative of each.
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree)


def align(tree: _Tree) -> _Tree:
    """Makes all arrays vary over the mesh axes over which any of them does."""
    leaves = jax.tree.leaves(tree)
    axes = frozenset[Any]().union(*map(varying, leaves))
    return vary(tree, axes)


def like(tree: _Tree, x: Array) -> _Tree:
    """Makes fresh arrays vary over the mesh axes over which `x` does."""
    return vary(tree, varying(x))


def vary(tree: _Tree, axes: Iterable[Any]) -> _Tree:
    """Makes all arrays vary over these mesh axes."""
    wanted = frozenset(axes)

    def cast(x: Array) -> Array:
        missing = tuple(wanted - varying(x))
        if not missing:
            return x
        lax: Any = jax.lax  # no version's annotations know both names
        return lax.pcast(x, missing, to="varying") if _SINCE_0_9 else lax.pvary(x, missing)

    return jax.tree.map(cast, tree) if wanted else tree


def with_sharding_of(d: Array, x: Array) -> Array:
    """The cotangent, or other companion, `d` of `x` sharded as that is: for explicit mesh axes."""
    spec = jax.typeof(x).sharding.spec
    return d if jax.typeof(d).sharding.spec == spec else reshard(d, spec)


def rows_like(x: Array, z: Array) -> Array:
    """`x`, which has the rows of `z` and perhaps a last axis, sharded as these rows are."""
    spec = P(*jax.typeof(z).sharding.spec[:-1], *[None] * (x.ndim - z.ndim + 1))
    return x if jax.typeof(x).sharding.spec == spec else reshard(x, spec)


def is_own(z: Array) -> bool:
    """Whether all of an array is known to be on one device, and its axes to be of known length.

    To read a sharded axis in another way would move data, and a symbolic one has no length.
    """
    return all(isinstance(size, int) for size in z.shape) and is_local(z)


def is_spread(x: Array) -> bool:
    """Whether an array is sharded over explicit mesh axes."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def is_local(z: Array) -> bool:
    """Whether all of an array is known to be on one device."""
    return not is_spread(z) and not _may_be_sharded()


def _may_be_sharded() -> bool:
    """Whether there are devices over which arrays may be sharded without JAX telling us.

    Over mesh axes that are explicit it tells, and where they are manual, as in `jax.shard_map`,
    arrays are a device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    several = max(jax.device_count(), mesh.size) > 1
    return several and (mesh.empty or bool(mesh.auto_axes))


def inside_shard_map() -> bool:
    """Whether arrays are a device's parts of larger ones."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def check_sharded(name: str, x: Array, axis_name: str | None) -> None:
    """Raises if `axis_name` is given but, to JAX, `x` does not vary over it."""
    if axis_name is not None and axis_name not in varying(x):
        raise ValueError(
            f"{name} must vary over the mesh axis {axis_name!r} (axis_name), but varies over "
            f"{sorted(varying(x))}. Call this inside jax.shard_map with {name} sharded over that "
            "axis and check_vma=True, its default: with check_vma=False gradients would be "
            "silently wrong"
        )


def first_class(local_classes: int, axis_name: str | None) -> int | Integer[Array, ""]:
    """The id of this device's first class; devices hold consecutive ranges of equal size."""
    if axis_name is None:
        return 0
    return jax.lax.axis_index(axis_name) * local_classes


def merge_across(part: Partial, axis_name: str | None) -> Partial:
    """Merges the statistics of all devices of `axis_name`: one maximum, one sum of [rows] each."""
    if axis_name is None:
        return part
    spread = axis_name in varying(part.base)  # not so if it is that of all devices already
    row_max = max_over(part.base, axis_name) if spread else part.base
    scale = jnp.exp(part.base - row_max)
    sum_exp = jax.lax.psum(part.sum_exp * scale, axis_name)
    argmax = part.argmax
    if argmax is not None:
        # The lowest class among those that reach the maximum, as `jnp.argmax` has it.
        argmax = jax.lax.pmin(jnp.where(part.base == row_max, argmax, NOWHERE), axis_name)
    total = psum(share_of(part, scale, row_max, sum_exp), axis_name)
    return total._replace(base=row_max, sum_exp=sum_exp, argmax=argmax)


def whole(x: Array) -> Array:
    """`x` on every device; it may be sharded over explicit mesh axes."""
    return reshard(x, P()) if is_spread(x) else x


def take_rows(table: Float[Array, "classes ..."], ids: Integer[Array, "..."]) -> Array:
    """`table[ids]`, sharded as `ids` is; explicit mesh axes do not let JAX choose that."""
    table, rows = whole(table), jax.typeof(ids).sharding
    if not rows.mesh.explicit_axes:
        return table[ids]
    # Also where no axis is sharded: one that vmap has taken away may be. JAX then wants one more.
    spec = P(None, *rows.spec, *(None,) * (table.ndim - 1))
    return table.at[ids[None]].get(out_sharding=spec)[0]


def take_class(
    per_class: Float[Array, " classes"], ids: Integer[Array, "*rows"], axis_name: str | None
) -> Float[Array, "*rows"]:
    """`per_class[ids]`, with `per_class` sharded like the classes."""
    if axis_name is None:
        return take_rows(per_class, ids)
    local = ids - first_class(per_class.shape[0], axis_name)
    inside = (local >= 0) & (local < per_class.shape[0])
    return jax.lax.psum(jnp.where(inside, per_class[jnp.where(inside, local, 0)], 0), axis_name)


def all_classes(local_classes: int, axis_name: str | None) -> int:
    """The number of classes of a whole row."""
    return local_classes if axis_name is None else local_classes * jax.lax.axis_size(axis_name)


def real_classes(
    size: int,
    first: int | Integer[Array, ""],
    classes: int,
    local_classes: int,
    axis_name: str | None,
) -> Bool[Array, " size"] | None:
    """Which of this device's classes from `first` on are not padding; None if no device has any."""
    if classes >= all_classes(local_classes, axis_name):
        return None
    ids = jnp.arange(size, dtype=jnp.int32) + first_class(local_classes, axis_name) + first
    return ids < classes


def without_padding(
    z: Float[Array, "*rows block"],
    first: int | Integer[Array, ""],
    classes: int,
    local_classes: int,
    axis_name: str | None,
) -> Float[Array, "*rows block"]:
    """Logits of this device's classes from `first` on, with -inf in padding."""
    real = real_classes(z.shape[-1], first, classes, local_classes, axis_name)
    return z if real is None else jnp.where(real, z, -jnp.inf)


def sum_over(x: Float[Array, "*rows"], axis_name: str | None) -> Float[Array, "*rows"]:
    """The sum over the devices of the class axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def max_over(x: Float[Array, "*rows"], axis_name: str | None) -> Float[Array, "*rows"]:
    """The maximum over the devices of the class axis, as a constant."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmax(x, axis_name)
