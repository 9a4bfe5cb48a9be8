"""Ways to read a tile faster, or in less memory, than `_rows.tile`, for one platform each.

Three ways are left, each in the file of its platform, with what it gains:

    where                                        what                      way
    GPU (CUDA), a tile of more than 8 MB         maximum and normaliser    gpu.normaliser
    CPU, smoothing, or soft labels of 64         sums over the classes     cpu.read
    classes and more
    CPU                                          argmax                    cpu.first_of

Everything else is read the plain way. No way changes a result but in its last digits, and the time
of none depends on the numbers. Formulas of losses live in `_rows`. `block_sizes` chooses how large
the blocks of the linear form are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from .._rows import tile
from . import cpu, gpu


def normaliser(
    z: Float[Array, "*rows classes"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """`tile.normaliser`, in the way of the platform."""
    if not is_own(z) or z.size * z.dtype.itemsize <= gpu.CACHED_BYTES:
        return tile.normaliser(z)
    row_max, sum_exp = jax.lax.platform_dependent(z, cuda=gpu.normaliser, default=tile.normaliser)
    return jax.lax.stop_gradient(row_max), sum_exp


def read(
    z: Float[Array, "*rows classes"],
    target: tile.Target,
    normaliser: tuple[Float[Array, "*rows"], Float[Array, "*rows"]],
    **options: Any,
) -> tile.Partial:
    """`tile.read`, in the way of the platform."""
    plain: Any = functools.partial(tile.read, **options)
    if not is_own(z) or not cpu.reads(z, target, argmax=options.get("argmax", False)):
        return plain(z, target, normaliser)
    on_a_cpu = functools.partial(cpu.read, **options)
    part: tile.Partial = jax.lax.platform_dependent(
        z, target, normaliser, cpu=on_a_cpu, default=plain
    )
    return part


def is_own(z: Array) -> bool:
    """Whether all of an array is known to be on one device, and its axes to be of known length.

    To read a sharded axis in another way would move data, and a symbolic one has no length.
    """
    return all(isinstance(size, int) for size in z.shape) and is_local(z)


def is_local(z: Array) -> bool:
    """Whether all of an array is known to be on one device."""
    spread = any(axis is not None for axis in jax.typeof(z).sharding.spec)
    return not spread and not _may_be_sharded()


def _may_be_sharded() -> bool:
    """Whether there are devices over which arrays may be sharded without JAX telling us.

    Over mesh axes that are explicit it tells, and where they are manual, as in `jax.shard_map`,
    arrays are a device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    several = max(jax.device_count(), mesh.size) > 1
    return several and (mesh.empty or bool(mesh.auto_axes))
