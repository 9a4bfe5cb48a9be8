"""Differences between the supported versions of JAX, with one name for each.

When the oldest supported version behaves like the newest, remove the choice.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jaxtyping import Array

_Tree = TypeVar("_Tree")

_SINCE_0_9 = hasattr(jax, "reshard")
reshard = jax.reshard if _SINCE_0_9 else jax.sharding.reshard


def varying(x: Array) -> frozenset[Any]:
    """The axes of `jax.shard_map` over which, to JAX, `x` varies."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # before jax 0.10


def vary_over(x: Array, axes: tuple[Any, ...]) -> Array:
    """`x`, varying over these axes too; it must not vary over any of them yet."""
    lax: Any = jax.lax  # no version's annotations know both names
    return lax.pcast(x, axes, to="varying") if _SINCE_0_9 else lax.pvary(x, axes)


def psum(tree: _Tree, axes: str | tuple[str, ...]) -> _Tree:
    """The sums over devices of several arrays, not all of which need have a derivative."""
    if _SINCE_0_9:
        return jax.lax.psum(tree, axes)
    # Before jax 0.9 the transpose of one sum of several arrays wants the derivative of each.
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree)
