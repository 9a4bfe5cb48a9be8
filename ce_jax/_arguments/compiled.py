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
    """`x`, if it is None or JAX takes it, or else the array it stands for."""
    x = _one_array(name, x)
    if _wraps(x):
        raise ValueError(
            f"{name} must hold integers of 32 bits, as JAX has wider ones only if jax_enable_x64 "
            f"is set, got {np.min(x)} to {np.max(x)}; ids may be numbered, as by "
            f"np.unique({name}, return_inverse=True)[1], and other numbers be floats"
        )
    return x


def numeric(name: str, x: Any) -> Any:
    """`array` of numbers that are no ids: too large an integer becomes a float."""
    x = _one_array(name, x)
    return np.asarray(x, float) if _wraps(x) else x


def unwrapped(x: Any) -> Any:
    """The array that a parameter of Flax holds, which may be traced; anything else as it is."""
    wraps = not isinstance(x, _AS_IT_IS) and hasattr(x, "__jax_array__")
    return x.__jax_array__() if wraps else x


def _one_array(name: str, x: Any) -> Any:
    """As `array`, whatever the range of integers."""
    if hasattr(x, "_fields"):  # as an array it would be that of all its fields
        kind, fields = type(x).__name__, ", ".join(x._fields)
        raise TypeError(f"{name} must be an array, got {kind}; give one of its fields: {fields}")
    x = unwrapped(x)
    if x is not None and not isinstance(x, _AS_IT_IS):
        try:
            x = np.asarray(x) if hasattr(x, "__array__") else jnp.asarray(x)
        except OverflowError:  # of integers in a list
            x = np.asarray(x)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array or a nested list of numbers, got {reprlib.repr(x)}"
            ) from error
    if isinstance(x, np.ndarray | np.generic):
        # Wider than 64 bits for a real number: NumPy's extended precision.
        long = x.dtype.itemsize > {"f": 8, "c": 16}.get(x.dtype.kind, x.dtype.itemsize)
        if long or x.dtype.kind in "OSUMm":  # V: bfloat16
            raise TypeError(f"{name} must hold numbers of a dtype of JAX, got {x.dtype}")
    return x


def _wraps(x: Any) -> bool:
    """Whether JAX would take other integers for these, as they do not fit into its dtype."""
    if not isinstance(x, np.ndarray | np.integer | int):
        return False
    given = np.asarray(x)
    if given.dtype.kind not in "iu":
        return given.dtype.kind == "O"  # a number of more than 64 bits
    dtype = jax.dtypes.canonicalize_dtype(given.dtype)
    return dtype != given.dtype and not np.array_equal(given.astype(dtype), given)


def _arrays(name: str, x: Any) -> Any:
    """`array`, of a named tuple field by field: a function may take one."""
    if not hasattr(x, "_fields"):
        return array(name, x)
    return type(x)(*(_arrays(f"{name}.{f}", y) for f, y in zip(x._fields, x, strict=True)))


def compiled_in(value: Any) -> str:
    """Advice for a traced number in place of a constant of the program, or nothing."""
    if not isinstance(value, jax.core.Tracer) or value.ndim:
        return ""
    return (
        "; it is a constant of the program: set it by functools.partial inside jax.jit, or name it "
        "in static_argnames"
    )


def check_constant(name: str, kind: Any, value: Any) -> None:
    """Raises for an option that is compiled in and does not fit. Others are checked by name."""
    if kind == "bool" and not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be True or False, got {reprlib.repr(value)}{compiled_in(value)}"
        )
    if name != "axis_name" or value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"axis_name must be the name of one mesh axis, got {value!r}")
    try:
        jax.lax.axis_size(value)
    except NameError:
        raise ValueError(
            f"axis_name must name a mesh axis of the jax.shard_map around this call, got {value!r}"
        ) from None


def compiled(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """`function` as one cached program: its positional arguments are arrays, the rest constants.

    Inside another `jit` it becomes a part of that program.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    constants = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    run = jax.jit(function, static_argnames=tuple(constants), inline=True)

    @functools.wraps(function)
    def call(*arrays: Any, **options: Any) -> _Result:
        for name, value in options.items():
            check_constant(name, constants[name], value)
        # JAX traces the rule of a derivative with a mesh set, be it an empty one. Where one is set
        # for the function too, what both compute is traced once, in up to a third less time.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return run(*map(_arrays, names, arrays), **options)

    return call


def recomputed(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """`function`, whose gradient computes everything again. It is to be `compiled`.

    For losses of elements with many steps: for a GPU, XLA would store an array of the logits' size
    for each step. The function has to contain the reduction. Else the cotangent of a sum, which is
    one number, would be stored in such an array, too.
    """

    @functools.wraps(function)
    def call(*arrays: Any, **options: Any) -> _Result:
        return jax.checkpoint(functools.partial(function, **options))(*arrays)

    return call
