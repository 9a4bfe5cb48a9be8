"""Argument errors: each names the argument, what was found and what is wanted.

`TypeError` is about kinds (a dtype, a type), `ValueError` about values (a shape, a range, a name).
Shapes and dtypes are known while tracing, so all checks cost nothing when the compiled function
runs. Ranges of options are checked where the value is known: a traced one passes unseen.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

REDUCTIONS = ("none", "sum", "mean")


def floating(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    return x


def integer(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is integer."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype (class ids), got {x.dtype}")
    return x


def real(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is floating, integer or bool."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must have a real dtype, got {x.dtype}")
    return x


def boolean(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is bool."""
    x = jnp.asarray(x)
    if x.dtype != jnp.bool_:
        raise TypeError(f"{name} must have dtype bool, got {x.dtype}")
    return x


def shape_is(name: str, x: Array, shape: Sequence[int], meaning: str) -> None:
    """Raises unless `x` has exactly this shape."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}), got {x.shape}")


def broadcast(name: str, x: Array, shape: Sequence[int], meaning: str) -> Array:
    """`x` broadcast to `shape`, if that adds nothing to `shape`."""
    shape = tuple(shape)
    fits = len(x.shape) <= len(shape) and all(
        have in (1, want) for have, want in zip(x.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {shape} ({meaning}), got {x.shape}")
    return jnp.broadcast_to(x, shape)


def common_shape(name: str, x: Array, other_name: str, other: Array) -> tuple[int, ...]:
    """The shape to which both arrays broadcast."""
    try:
        return jnp.broadcast_shapes(x.shape, other.shape)
    except ValueError as error:
        raise ValueError(
            f"{name} and {other_name} must have shapes that broadcast together, "
            f"got {x.shape} and {other.shape}"
        ) from error


def axes(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct non-negative axes; None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    wanted = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    for a in wanted:
        if isinstance(a, bool) or not hasattr(a, "__index__"):
            raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}")
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {axis} is out of range for {ndim} dimension(s)")
    found = tuple(int(a) % ndim for a in wanted)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"axis must name at least one axis and none of them twice, got {axis}")
    return found


def static_axis(axis: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """`axis` in a hashable form."""
    return tuple(axis) if isinstance(axis, Sequence) else axis


def reduction(value: str) -> None:
    """Raises unless `value` is one of the three reductions."""
    if value not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {value!r}")


def integer_option(name: str, value: int | None) -> int | None:
    """`value` as a Python int: it takes part in the compiled function as a constant."""
    if value is None:
        return None
    if isinstance(value, bool | jax.core.Tracer) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    return int(value)


def float_option(
    name: str, value: ArrayLike | None, low: float = 0.0, high: float = math.inf
) -> ArrayLike | None:
    """The option's value, or None where it is known to be 0 and so has no effect.

    Raises where the value is known and not in `[low, high]`. Any scalar that is not traced is
    known: outside `jit`, a `jax.Array` is read back for it.
    """
    if value is None:
        return None
    if isinstance(value, jax.core.Tracer):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} must be a real scalar, got dtype {value.dtype}")
    elif not isinstance(value, numbers.Real | jax.Array | np.ndarray) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real scalar, got {value!r}")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(np.asarray(value))
    if not low <= number <= high or math.isinf(number):
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return None if number == 0 else value


def soft_cap(value: ArrayLike | None) -> ArrayLike | None:
    """The value of `logit_soft_cap`, which has no number that means "none"."""
    if float_option("logit_soft_cap", value) is None and value is not None:
        raise ValueError(f"logit_soft_cap must be positive or None, got {value}")
    return value


def kernel_axis(hidden: Array, kernel: Array, axis: int, prefix: str = "") -> int:
    """The axis of `kernel` that holds the classes, if the other one fits `hidden`.

    The prefix is that of the arguments' names.
    """
    if hidden.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"{prefix}hidden must have shape [..., D] and {prefix}kernel two axes, of D and of the "
            f"classes; got {hidden.shape} and {kernel.shape}"
        )
    if kernel.dtype != hidden.dtype:
        raise TypeError(
            f"{prefix}kernel must have the dtype of {prefix}hidden, {hidden.dtype}, "
            f"got {kernel.dtype}; cast the one that is to be rounded or widened"
        )
    if axis not in (-2, -1, 0, 1):
        raise ValueError(
            f"{prefix}class_axis must be an axis of {prefix}kernel, 0 or 1 (or -1), got {axis}"
        )
    axis %= 2
    width = kernel.shape[1 - axis]
    if width != hidden.shape[-1] or 0 in kernel.shape:
        raise ValueError(
            f"{prefix}kernel must have shape {('D, V' if axis else 'V, D')} with "
            f"D = {hidden.shape[-1]} and V > 0 for {prefix}class_axis={axis}, got {kernel.shape}"
        )
    return axis


def class_count(value: int | None, held: int) -> int:
    """The value of `num_classes`: by default all that the kernel holds."""
    if value is not None and not 0 < value <= held:
        raise ValueError(f"num_classes must be in [1, {held}], what kernel holds, got {value}")
    return held if value is None else value


def memory_budget(value: int | None) -> int | None:
    """The value of `memory_budget`, in bytes."""
    value = integer_option("memory_budget", value)
    if value is not None and value < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, got {value}")
    return value


def element_function(name: str, function: Callable[[Array], Array], one: Array) -> None:
    """Raises unless `function` turns one number into one number of the same dtype."""
    if not callable(function):
        raise TypeError(f"{name} must be a function or None, got {function!r}")
    out = jax.eval_shape(function, one)
    if getattr(out, "shape", None) != ():
        raise ValueError(
            f"{name} must give one number for one log-probability (what differs from row to row "
            f"belongs into sample_weight), got {out}"
        )
    if out.dtype != one.dtype:
        raise TypeError(f"{name} must give the dtype it gets, {one.dtype}, got {out.dtype}")
