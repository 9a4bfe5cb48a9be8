"""A loop over blocks of entries, and what a block reads and writes of an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._platform import block_sizes
from . import sharded
from .dtypes import wide
from .picked import First

_Carry = TypeVar("_Carry")
_Tree = TypeVar("_Tree")


def take(x: Array, first: First, size: int, axis: int = 0) -> Array:
    """`size` consecutive entries of an axis; all of them without a copy."""
    if size == x.shape[axis]:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis, allow_negative_indices=False)


def put(x: Array, block: Array, first: First, axis: int = 0) -> Array:
    """`x` with `block` from entry `first` of an axis on, in the dtype of `x`."""
    if block.shape == x.shape:
        return block.astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), first, axis)


def read_by_all(inputs: _Tree, read: _Tree | None = None) -> Callable[[], _Tree]:
    """Gives each block the arrays that all blocks read.

    These are the inputs, or `read`, the same numbers in other dtypes.

    Where JAX derives a derivative of the loop (forward mode, second derivatives), it adds up their
    cotangents over the blocks in the dtype in which the blocks find them. Those of narrow arrays
    therefore go to a wide copy. Nothing reads its numbers, so XLA leaves it out of other programs.
    """
    copies = jax.tree.map(lambda x: x.astype(wide(x.dtype)), inputs)

    def constant(copy: Array, x: Array) -> Array | None:
        return None if copy.dtype == x.dtype else jax.lax.stop_gradient(x)

    constants = jax.tree.map(constant, copies, inputs if read is None else read)

    def of_block(copy: Array, x: Array | None) -> Array:
        return copy if x is None else with_slope_of(copy, x)

    return lambda: jax.tree.map(of_block, copies, constants)


@jax.custom_jvp
def with_slope_of(copy: Array, x: Array) -> Array:
    """`x`, with the derivatives of `copy`."""
    del copy
    return x


@with_slope_of.defjvp
def _with_slope_of_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (copy, x), (slope, _) = primals, tangents
    return with_slope_of(copy, x), slope.astype(x.dtype)


def over_blocks(
    step: Callable[[_Carry, First, int], _Carry], carry: _Carry, total: int, most: int
) -> _Carry:
    """Runs `step(carry, first, size)` over `total` entries in blocks of at most `most`.

    The last block may be smaller. The platform decides whether it is run before the others.

    Each step is checkpointed: a derivative of the loop (forward mode, second derivatives)
    recomputes each block instead of storing all of them.
    """

    def one(carry: _Carry, first: First, size: int) -> _Carry:
        run = jax.checkpoint(lambda c, f: step(c, f, size), prevent_cse=False)
        # `first` varies over the devices as the carry does: if a mask is batched, JAX turns `cond`
        # into a select, and all that a block reads then varies over them.
        first = sharded.like(jnp.asarray(first, jnp.int32), jax.tree.leaves(carry)[0])
        return run(carry, first)

    size, full, rest = cut(total, most)

    def all_full(carry: _Carry) -> _Carry:
        # A constant, for which no kernel is compiled, unless the number is symbolic.
        arange: Any = np.arange if isinstance(full, int) else jnp.arange
        firsts = arange(full, dtype=np.int32) * size
        return jax.lax.scan(lambda c, first: (one(c, first, size), None), carry, firsts)[0]

    if not isinstance(total, int):
        carry = one(carry, total - rest, rest)
        return jax.lax.cond(jnp.asarray(total) > rest, all_full, lambda carry: carry, carry)
    ragged_first = block_sizes.ragged_first()
    if rest and ragged_first:
        carry = one(carry, full * size, rest)
    if full == 1:
        carry = one(carry, 0, size)
    elif full > 1:
        carry = all_full(carry)
    if rest and not ragged_first:
        carry = one(carry, full * size, rest)
    return carry


class Cut(NamedTuple):
    """Blocks of some entries: their size, how many are full, and how many entries are left over.

    If the number of entries is symbolic, so are these. Then there always are some left over, and
    there are no full blocks if those are all.
    """

    size: int
    full: int
    rest: int


def cut(total: int, most: int) -> Cut:
    """Cuts `total` entries into blocks of at most `most`."""
    if isinstance(total, int):
        size = max(min(most, total), 1)
        return Cut(size, *divmod(total, size))
    from jax import export  # it would take long to import for everybody

    def symbolic(expression: str) -> int:
        (size,) = export.symbolic_shape(expression, scope=total.scope)
        return size

    # JAX has to see that a block is not empty and lies within the whole. It does if that is
    # written down, and it takes symbolic numbers to be at least 1.
    size = symbolic(f"min({most}, {total})")
    full = symbolic(f"max(floordiv({total} - 1, {size}), 1)")
    return Cut(size, full, symbolic(f"min(mod({total} - 1, {size}) + 1, {total})"))
