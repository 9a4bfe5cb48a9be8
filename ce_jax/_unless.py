"""A second way to a value, taken only where the first one failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Bool

_Tree = TypeVar("_Tree")


def unless(holds: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if it holds, else `other()`.

    A loop of one turn or none stands for `lax.cond`. XLA keeps what it starts from in the memory of
    the result, where a branch that hands it on would copy; and under `vmap` there is a turn only if
    some of the batch needs one, where both branches would always be computed. As a loop it has no
    reverse mode: for what has no derivative, or has a rule of its own.
    """
    found: tuple[Array, _Tree] = jax.lax.while_loop(
        lambda found: ~found[0], lambda found: (found[0] | True, other()), (holds, value)
    )
    return found[1]
