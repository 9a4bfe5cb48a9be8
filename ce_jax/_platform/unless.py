"""A second way to a value, or to some of its blocks, taken only where the first one failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from .parts import apart

_Tree = TypeVar("_Tree")


def unless(holds: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if it holds, else `other()`.

    A loop of one turn or none stands for `lax.cond`. XLA keeps what it starts from in the memory of
    the result, where a branch that hands it on would copy; and under `vmap` there is a turn only if
    some of the batch needs one, where both branches would always be computed. As a loop it has no
    reverse mode: for what has no derivative, or has a rule of its own.
    """
    found: tuple[Array, _Tree] = jax.lax.while_loop(
        lambda found: found[0], lambda found: (found[0] & False, other()), (~holds, value)
    )
    return found[1]


def mended(
    missed: Integer[Array, ""],
    count: int,
    value: _Tree,
    other: Callable[[Callable[[Array], Array]], _Tree],
) -> _Tree:
    """`value`, but `other(cut)` for each of up to 32 blocks of the first axis that was missed.

    Block `k` of `count`, of equal length, was if bit `k` is set; `cut` takes it from an array with
    the same first axis. A loop for the reasons of `unless`, with a turn for each such block.
    """
    if count == 1:
        return unless(missed == 0, value, lambda: other(lambda x: x))

    def mend(state: tuple[Array, _Tree]) -> tuple[Array, _Tree]:
        missed, value = state
        highest = 31 - jax.lax.clz(missed)

        def first(x: Array, size: int) -> list[Array | np.int32]:
            return [highest.astype(jnp.int32) * size, *[np.int32(0)] * (x.ndim - 1)]

        def cut(x: Array) -> Array:
            shape = (x.shape[0] // count, *x.shape[1:])
            start = first(x, shape[0])
            # Narrow ones as integers, and tied to the state of the loop: or XLA would find all of
            # the array ahead of it, in float32.
            kind = jnp.uint16 if x.dtype.itemsize == 2 else x.dtype
            bits = jax.lax.bitcast_convert_type(apart((x, missed))[0], kind)
            block = jax.lax.dynamic_slice(bits, start, shape, allow_negative_indices=False)
            return jax.lax.bitcast_convert_type(block, x.dtype)

        def put(x: Array, block: Array) -> Array:
            start = first(x, block.shape[0])
            return jax.lax.dynamic_update_slice(x, block, start, allow_negative_indices=False)

        return missed ^ (jnp.uint32(1) << highest), jax.tree.map(put, value, other(cut))

    return jax.lax.while_loop(lambda state: state[0] != 0, mend, (missed, value))[1]
