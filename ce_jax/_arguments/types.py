"""Types of arguments, under names that can be read in a signature."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax.typing

# What NumPy means by the name, too: an array, a number, or a nested list of numbers.
ArrayLike: TypeAlias = jax.typing.ArrayLike | list[Any] | tuple[Any, ...]
# A number, traced or not. A wrong shape or dtype has to reach the checks of ours.
Scalar: TypeAlias = jax.typing.ArrayLike
Reduction: TypeAlias = Literal["none", "sum", "mean"]
