"""Ways to read a tile faster, or in less memory, than `_rows.tile`, for one platform each.

    where                                        what                      way
    GPU (CUDA), a tile of more than 8 MB         maximum and normaliser    gpu.normaliser
    CPU, bfloat16 of 8 MB in float32             every reading             cpu.apart
    CPU, soft labels of 64 classes and more      sums over the classes     cpu.apart
    CPU, smoothing                               sums over the classes     cpu.row_sums
    GPU (CUDA)                                   two sums over classes     gpu.row_sums
    CPU                                          argmax                    cpu.first_of
    CPU, fewer than 64 columns                   the sigmoid loss          cpu.in_one_row

Each platform's file says what its ways gain. No way changes more than the last digits of a result,
and the time of none depends on the numbers. `block_sizes` is for all that goes in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from .._rows import sharded, tile
from . import cpu, gpu


def normaliser(z: Float[Array, "*rows classes"], seen: tile.Seen = None) -> tile.Normaliser:
    """`tile.normaliser`, in the way of the platform."""
    ways: dict[str, Any] = {}
    if sharded.is_own(z) and z.size * z.dtype.itemsize > gpu.CACHED_BYTES:
        ways["cuda"] = gpu.normaliser
    if sharded.is_own(z) and cpu.stores_wide(z):
        ways["cpu"] = cpu.normaliser
    if not ways:
        return tile.normaliser(z, seen)
    row_max, sum_exp = jax.lax.platform_dependent(z, seen, **ways, default=tile.normaliser)
    return jax.lax.stop_gradient(row_max), sum_exp


def read(
    z: Float[Array, "*rows classes"],
    target: tile.Target,
    normaliser: tile.Normaliser,
    **options: Any,
) -> tile.Partial:
    """`tile.read`, in the way of the platform."""
    plain, own = (functools.partial(f, **options) for f in (tile.read, cpu.read))
    if not sharded.is_own(z) or not (options.get("argmax") or cpu.shares(z, target)):
        return plain(z, target, normaliser)
    return jax.lax.platform_dependent(z, target, normaliser, cpu=own, default=plain)


def row_sums(summands: dict[str, Array]) -> dict[str, Array]:
    """`tile.row_sums`, in the way of the platform."""
    if not all(map(sharded.is_own, summands.values())):
        return tile.row_sums(summands)
    found: dict[str, Array] = jax.lax.platform_dependent(
        summands, cuda=gpu.row_sums, default=tile.row_sums
    )
    return found


def elementwise(function: Callable[..., Any], z: Array, *others: Array | None) -> Any:
    """A function of each element of arrays of one shape, in the way of the platform."""
    if z.ndim < 2 or not sharded.is_own(z) or z.shape[-1] >= cpu.FEWEST:
        return function(z, *others)
    in_one_row = functools.partial(cpu.in_one_row, function)
    return jax.lax.platform_dependent(z, *others, cpu=in_one_row, default=function)


def reread(z: Array, part: tile.Partial) -> tuple[Array, tile.Partial]:
    """The same tile and statistics, for the gradient, in the way of the platform."""
    if not sharded.is_own(z) or not cpu.stores_wide(z):
        return z, part
    return jax.lax.platform_dependent(z, part, cpu=cpu.reread, default=lambda *same: same)
