"""Rows in parts, where XLA reads those faster or in less memory.

On a CPU its reductions take up to eight times as long for each element where an axis has more than
2^15 of them (`exp` summed in float32, jax 0.10.2: 0.55 ns up to 32768 classes, 4.5 ns for 50257).
The same numbers in shorter axes take what short axes take. On an NVIDIA GPU it cuts rows longer
than 2^14 itself, into many parts, and stores a number for each: 8.4 MB a sum for 8192 rows of
256000 (256 parts of 1000), where 16 parts would do, and 8 if halves of them are joined number by
number before. Elsewhere rows stay whole, and so they do where their axes may be spread over
devices.

A sum over parts has another shape than the tile has in the pull-back, so XLA shares nothing between
the two: what both need is computed twice, and nothing of the size of the tile is kept.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

_LONGEST = 1 << 15
_LONGEST_ON_GPU = 1 << 14
# Rows from which on a narrow tile is faster on a CPU without the float32 copy that would be kept.
_LONG_IF_NARROW = 1 << 13
# Parts shorter than this are no faster.
_SHORTEST = 1 << 8
# Rows up to this length are short: what a CPU does row by row, such as adding up, is slow there.
FEW_CLASSES = 16
# About how many numbers make a long one.
_LONG = 1 << 10
# Rows from which on it pays to look for the part that holds the maximum.
_LONG_TO_SEARCH = 1 << 6

# So many additions LLVM unrolls, of numbers that take little to compute.
_UNROLLED = 32

# In which shape a platform reads the rows of a tile; those not named read them as they are.
Shapes = dict[str, tuple[int, ...]]
_Cut = Callable[[Array], Array]
_Tree = TypeVar("_Tree")


def best_shapes(z: Float[Array, "*rows classes"], *, alone: bool, entropy: bool) -> Shapes:
    """In which shapes the rows of a tile are best added up.

    The last axis is a row or an equal part of one; a length without a suitable divisor stays whole.

    Args:
      z: the tile.
      alone: whether no derivative will be taken, so that there is nothing to share with one.
      entropy: whether that is asked for, which a narrow tile is widened for in any case.
    """
    if not is_own(z):
        return {}
    found = {}
    cpu = _best_on_cpu(z, alone and _is_tall(z), entropy)
    if cpu is not None:
        found["cpu"] = cpu
    *rows, classes = z.shape
    count = _divisor(classes, -(-classes // _LONGEST_ON_GPU))
    if count > 1:
        halves = math.gcd(count, 2)  # joined in `reduced`
        found["cuda"] = (*rows, count // halves, halves * (classes // count))
    return found


def _best_on_cpu(
    z: Float[Array, "*rows classes"], stacked: bool, entropy: bool
) -> tuple[int, ...] | None:
    *rows, classes = z.shape
    count = _divisor(classes, -(-classes // _LONGEST))
    if count == 1 and z.dtype.itemsize < 4 and classes >= _LONG_IF_NARROW and not entropy:
        count = _divisor(classes, 2)
    if count == 1 and not stacked:
        return None
    parts = math.prod(rows) * count
    stacks = _divisor(parts, -(-parts // _LONGEST))
    stacked_parts = (parts,) if stacks <= 1 else (stacks, parts // stacks)
    return (*stacked_parts, classes // count)


def differs_alone(z: Float[Array, "*rows classes"]) -> bool:
    """Whether a CPU may read the tile in another way if no derivative will be taken."""
    return _is_tall(z) or (is_own(z) and z.shape[-1] > _LONGEST)


def _is_tall(z: Float[Array, "*rows classes"]) -> bool:
    *rows, classes = z.shape
    return is_own(z) and max(rows, default=1) > _LONGEST and classes >= _SHORTEST


def row_maxima(z: Float[Array, "*rows classes"], shapes: Shapes) -> Float[Array, "*rows"]:
    """The largest logit of each row, found in `best_shapes`, as a constant.

    No statistic depends on it, so its derivative is left out of forward mode and of second
    derivatives too.
    """

    def of_parts(cut: _Cut, z: Array) -> Array:
        parts = cut(z)
        # Apart, or two maxima would become one, of whole rows.
        maxima = apart(reduced(jnp.max, jnp.maximum, parts))
        return jnp.max(maxima.reshape(*z.shape[:-1], z.shape[-1] // parts.shape[-1]), -1)

    maxima: Array = _by_platform(shapes, of_parts, lambda z: jnp.max(z, -1), z)
    return jax.lax.stop_gradient(maxima)


def row_argmax(z: Float[Array, "*rows classes"]) -> Integer[Array, "*rows"]:
    """The first class with the largest logit of each row.

    A CPU compares numbers one by one to find where the largest is, and many at once to find what it
    is. So it first looks for the part of the row that holds it: 4 to 20 times as fast.
    """

    def of_rows(z: Array) -> Array:
        return jnp.argmax(z, -1).astype(jnp.int32)

    count = 1 if not is_own(z) else _divisor_nearest_root(z.shape[-1])
    if count == 1 or z.shape[-1] < _LONG_TO_SEARCH:
        return of_rows(z)

    def of_parts(z: Array) -> Array:
        parts = z.reshape(*z.shape[:-1], count, z.shape[-1] // count)
        part = of_rows(jnp.max(parts, -1))
        best = jnp.take_along_axis(parts, part[..., None, None], -2)[..., 0, :]
        return part * best.shape[-1] + of_rows(best)

    largest: Array = jax.lax.platform_dependent(
        jax.lax.stop_gradient(z), cpu=of_parts, default=of_rows
    )
    return largest


def in_parts(
    sums_of: Callable[..., dict[str, Array]],
    shapes: Shapes,
    z: Float[Array, "*rows classes"],
    base: Float[Array, "*rows"],
    target: Any,
) -> dict[str, Array]:
    """`sums_of(z, base, target)`, which adds up over the classes, found in `best_shapes`.

    The arrays in `target` broadcast against `z`, and are cut like it unless they have no shape.
    """

    def of_parts(cut: _Cut, z: Array, base: Array, target: Any) -> dict[str, Array]:
        parts = cut(z)
        count = z.shape[-1] // parts.shape[-1]
        repeated = jnp.repeat(base.reshape(-1), count).reshape(parts.shape[:-1])
        target = jax.tree.map(lambda x: cut(jnp.broadcast_to(x, z.shape)) if x.ndim else x, target)
        found = apart(sums_of(parts, repeated, target))  # or two sums would become one
        rows = (*base.shape, count)
        return {name: jnp.sum(x.reshape(rows), -1) for name, x in found.items()}

    found: dict[str, Array] = _by_platform(shapes, of_parts, sums_of, z, base, target)
    return found


def _by_platform(
    shapes: Shapes, of_parts: Callable[..., Any], of_rows: Callable[..., Any], *arguments: Any
) -> Any:
    if not shapes:
        return of_rows(*arguments)
    cut = {
        platform: functools.partial(of_parts, functools.partial(_cut, platform, shape))
        for platform, shape in shapes.items()
    }
    return jax.lax.platform_dependent(*arguments, default=of_rows, **cut)


def in_one_axis(function: Callable[..., Array], *arrays: Array | None) -> Array:
    """`function`, element by element, of arrays of one shape, for a result that is added up.

    Where the last axis is short, a CPU computes it along a single one: sums of the result are
    faster by half. They fuse with it, so nothing is kept; for what is, see `in_long_rows`.
    """
    present = [x for x in arrays if x is not None]
    shape = present[0].shape
    if not all(is_own(x) for x in present) or len(shape) < 2 or shape[-1] >= _SHORTEST:
        return function(*arrays)

    def flat(*arrays: Array | None) -> Array:
        return function(*jax.tree.map(lambda x: x.reshape(-1), arrays)).reshape(shape)

    found: Array = jax.lax.platform_dependent(*arrays, cpu=flat, default=function)
    return found


def in_long_rows(function: Callable[..., Array], *arrays: Array | None) -> Array:
    """`function`, element by element, of arrays of one shape and scalars.

    Along rows of a few numbers, most of all narrow ones, a CPU takes up to three times as long. So
    it finds the result as rows of more numbers; in a branch, as XLA would return to the shape of
    what precedes and follows to fuse it with that. Longer rows cost less than to keep it apart.
    """
    present = [x for x in arrays if x is not None]
    *rows, classes = present[0].shape or (FEW_CLASSES + 1,)
    if not all(map(is_own, present)) or not rows or not 0 < classes <= FEW_CLASSES:
        return function(*arrays)
    count = math.prod(rows)
    joined = next((k for k in range(_LONG // classes, 0, -1) if count % k == 0), 1)

    def long(*arrays: Array | None) -> Array:
        shape = (count // joined, joined * classes)
        return function(*jax.tree.map(lambda x: x.reshape(shape) if x.ndim else x, arrays))

    def alone(*arrays: Array | None) -> Array:
        found: Array = jax.lax.cond(apart(jnp.array(True)), long, long, *arrays)
        return found.reshape(*rows, classes)

    found: Array = jax.lax.platform_dependent(*arrays, cpu=alone, default=function)
    return found


def reduced(
    reduce: Callable[..., Array], join: Callable[[Array, Array], Array], x: Float[Array, "*rows n"]
) -> Float[Array, "*rows"]:
    """`reduce(x, -1)`, for a GPU of the two halves joined where it would cut rows itself."""
    if not is_own(x) or x.shape[-1] % 2 or not 1 < x.shape[-1] / _LONGEST_ON_GPU <= 2:
        return reduce(x, -1)

    def of_halves(x: Array) -> Array:
        return reduce(join(*jnp.split(x, 2, -1)), -1)

    found: Array = jax.lax.platform_dependent(x, cuda=of_halves, default=lambda x: reduce(x, -1))
    return found


@jax.custom_jvp
def sums_in_one(
    summands: dict[str, Float[Array, "*rows classes"]],
) -> dict[str, Float[Array, "*rows"]]:
    """The row sums of two or more arrays, for a CPU by one kernel, which computes their elements.

    XLA has a fast way to add up one array, but stores that first if there is a select in it.
    Several it adds up in a loop, which LLVM makes as fast if it can unroll it. So a few numbers are
    added up at a time, in eight columns or more side by side; then what they come to, which takes
    an eighth to a sixteenth of the memory of each array.
    """
    first, *_ = summands.values()
    if not _has_own_classes(first):
        return {name: jnp.sum(x, -1) for name, x in summands.items()}
    found, start = [], 0
    for blocks, rows, columns in _blocks(first.shape[-1], _UNROLLED // len(summands)):
        stop = start + blocks * rows * columns
        shape = (*first.shape[:-1], blocks, rows, columns)
        parts = {name: x[..., start:stop].reshape(shape) for name, x in summands.items()}
        zeros = {name: jnp.zeros((), x.dtype) for name, x in parts.items()}
        add = functools.partial(jax.tree.map, jnp.add)
        added = jax.lax.reduce(parts, zeros, add, (len(shape) - 2,))
        found.append(jax.tree.map(lambda x: jnp.sum(x, (-2, -1)), added))
        start = stop
    sums: dict[str, Array] = jax.tree.map(lambda first, *rest: sum(rest, first), *found)
    return sums


# JAX's own derivative would add up halves, again and again.
@sums_in_one.defjvp
def _sums_in_one_jvp(
    primals: tuple[dict[str, Array]], tangents: tuple[dict[str, Array]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    return sums_in_one(*primals), jax.tree.map(lambda x: jnp.sum(x, -1), *tangents)


def _blocks(n: int, most: int) -> list[tuple[int, int, int]]:
    """Shapes `(blocks, rows, columns)` of up to `most` rows that hold `n` numbers between them.

    One of them, if some fits: for a remainder there is another kernel to compile and to start.
    """
    if n <= FEW_CLASSES:
        return [(1, n, 1)]
    for rows, columns in itertools.product(range(most, 7, -1), (*range(32, 15, -1), 8)):
        if n % (rows * columns) == 0:
            return [(n // (rows * columns), rows, columns)]
    columns = 8 if n >= 3 * 8 else 1
    blocks, rest = divmod(n // columns, most)
    shapes = [(blocks, most, columns), (1, rest, columns), (1, n % columns, 1)]
    return [shape for shape in shapes if math.prod(shape)]


def _cut(
    platform: str, shape: tuple[int, ...], x: Float[Array, "*rows classes"]
) -> Float[Array, "*parts width"]:
    cut = x.reshape(shape)
    # For a CPU XLA would move what is done to the parts, such as a conversion, ahead of the cut.
    # For a GPU it would store what is apart, such as logits with rows that do not count set to 0.
    return apart(cut) if platform == "cpu" else cut


def apart(x: _Tree) -> _Tree:
    """The same numbers, of which XLA does not know so."""
    barred: _Tree = jax.lax.optimization_barrier(x)
    return barred


def is_own(z: Array) -> bool:
    """Whether all of an array is known to be on one device, and its axes to be of known length.

    To cut an axis that is sharded moves data, and a symbolic one has no divisors.
    """
    return _has_own_classes(z) and all(isinstance(size, int) for size in z.shape)


def _has_own_classes(z: Array) -> bool:
    """Whether an array is known to be on one device, and its last axis to be of known length."""
    sharded = any(axis is not None for axis in jax.typeof(z).sharding.spec)
    known = all(isinstance(size, int) for size in z.shape[-1:])
    return known and not (sharded or _may_be_sharded())


def _may_be_sharded() -> bool:
    """Whether there are devices over which arrays may be sharded without JAX telling us.

    Over mesh axes that are explicit it tells, and where they are manual, as in `jax.shard_map`,
    arrays are a device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    several = max(jax.device_count(), mesh.size) > 1
    return several and (mesh.empty or bool(mesh.auto_axes))


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of `n` not below `least` that leaves some length, or 1."""
    return next((k for k in range(max(least, 1), n // _SHORTEST + 1) if n % k == 0), 1)


def _divisor_nearest_root(n: int) -> int:
    """The largest divisor of `n` up to its square root."""
    return next((k for k in range(math.isqrt(n), 1, -1) if n % k == 0), 1)
