"""One cached program per function; nested lists become arrays."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_Result = TypeVar("_Result")
_AS_IT_IS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def array(name: str, x: Any) -> Any:
    """`x`, if JAX takes it, or else the array it stands for; named tuples field by field."""
    if x is None or isinstance(x, _AS_IT_IS):
        return x
    if hasattr(x, "_fields"):
        return type(x)(*(array(f"{name}.{f}", y) for f, y in zip(x._fields, x, strict=True)))
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array or a nested list of numbers, got {reprlib.repr(x)}"
        ) from error


def compiled(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """`function` as one cached program: its positional arguments are arrays, the rest constants.

    Inside another `jit` it becomes a part of that program.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    constants = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    run = jax.jit(function, static_argnames=constants, inline=True)

    @functools.wraps(function)
    def call(*arrays: Any, **options: Any) -> _Result:
        # JAX traces the rule of a derivative with a mesh set, be it an empty one. Where one is set
        # for the function too, what both compute is traced once, in up to a third less time.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return run(*map(array, names, arrays), **options)

    return call
