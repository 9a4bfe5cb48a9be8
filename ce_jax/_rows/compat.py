"""What the supported versions of JAX call by different names, each under one name here.

When the oldest supported version has the newer name, its users call that and the choice goes.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

reshard = jax.reshard if hasattr(jax, "reshard") else jax.sharding.reshard  # before jax 0.9


def varying(x: Array) -> frozenset[Any]:
    """The axes of `jax.shard_map` over which JAX sees `x` vary."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # before jax 0.10


def vary_over(x: Array, axes: tuple[Any, ...]) -> Array:
    """`x`, varying over these axes too; it must not vary over any of them yet."""
    lax: Any = jax.lax  # no version's annotations know both names
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # before jax 0.9
