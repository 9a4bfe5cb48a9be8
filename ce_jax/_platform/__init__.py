"""Ways to read a tile faster, or in less memory, than `_rows.tile`, for one platform each.

    where                                        what                      way
    GPU (CUDA), a tile of more than 8 MB         maximum and normaliser    gpu.normaliser
    GPU (CUDA)                                   two sums of one row       gpu.two_sums
    CPU, bfloat16 of 8 MB in float32             every reading             cpu.apart
    CPU, soft labels of 64 classes and more      sums over the classes     cpu.apart
    CPU, smoothing                               sums over the classes     cpu.row_sums
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
    row_max, sum_exp = _run(tile.normaliser, ways, z, seen)
    return jax.lax.stop_gradient(row_max), sum_exp


def read(
    z: Float[Array, "*rows classes"],
    target: tile.Target,
    normaliser: tile.Normaliser,
    **options: Any,
) -> tile.Partial:
    """`tile.read`, in the way of the platform."""
    plain, own = (functools.partial(f, **options) for f in (tile.read, cpu.read))
    pays = sharded.is_own(z) and (options.get("argmax") or cpu.shares(z, target))
    return _run(plain, {"cpu": own} if pays else {}, z, target, normaliser)


def two_sums(a: Array, b: Array) -> tuple[Array, Array]:
    """The sums of two arrays over the last axis, in the way of the platform."""
    own = sharded.is_own(a) and sharded.is_own(b)
    return _run(lambda a, b: (a.sum(-1), b.sum(-1)), {"cuda": gpu.two_sums} if own else {}, a, b)


def elementwise(function: Callable[..., Any], z: Array, *others: Array | None) -> Any:
    """A function of each element of arrays of one shape, in the way of the platform."""
    few = z.ndim > 1 and sharded.is_own(z) and z.shape[-1] < cpu.FEWEST
    ways = {"cpu": functools.partial(cpu.in_one_row, function)} if few else {}
    return _run(function, ways, z, *others)


def reread(z: Array, part: tile.Partial) -> tuple[Array, tile.Partial]:
    """The same tile and statistics, for the gradient, in the way of the platform."""
    pays = sharded.is_own(z) and cpu.stores_wide(z)
    return _run(lambda *same: same, {"cpu": cpu.reread} if pays else {}, z, part)


def _run(plain: Callable[..., Any], ways: dict[str, Any], *arrays: Any) -> Any:
    return jax.lax.platform_dependent(*arrays, **ways, default=plain) if ways else plain(*arrays)
