"""Checks of arguments. Each error names the argument, what was found and what is wanted.

`TypeError` is about kinds (a dtype, a type), `ValueError` about values (a shape, a range, a name).
Shapes and dtypes are known while tracing, so all checks cost nothing when the compiled function
runs. Ranges of options are checked if the value is known; a traced value is not checked.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._rows import sharded
from .compiled import array, compiled_in, numeric
from .types import ArrayLike, Axes, Reduction

_Function = TypeVar("_Function", bound=Callable[..., Any] | None)

REDUCTIONS = get_args(Reduction)


def floating(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is floating."""
    x = _asarray(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cure = f"write jnp.asarray({name}, float)"
        if name in ("logits", "probs", "log_probs"):
            cure += ", or give class ids as labels"
        elif name == "labels":
            cure += " for a number per class; of class ids jax.nn.one_hot makes these"
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}; {cure}")
    return x


def integer(name: str, x: ArrayLike, cure: str = "") -> Array:
    """`x` as an array, if its dtype is integer."""
    x = _asarray(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype (class ids), got {x.dtype}{cure}")
    return x


def real(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is floating, integer or bool."""
    x = _asarray(name, numeric(name, x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must have a real dtype, got {x.dtype}")
    return x


def boolean(name: str, x: ArrayLike) -> Array:
    """`x` as an array, if its dtype is bool."""
    x = _asarray(name, x)
    if x.dtype != jnp.bool_:
        weights = "; give weights as sample_weight"
        raise TypeError(
            f"{name} must have dtype bool, got {x.dtype}; write {name} != 0"
            + weights * (name == "where")
        )
    return x


def _asarray(name: str, x: ArrayLike) -> Array:
    x = array(name, x)
    if x is None:
        raise TypeError(f"{name} must be an array, got None")
    return jnp.asarray(x)


def shape_is(name: str, x: Array, shape: Sequence[int], meaning: str, cure: str = "") -> None:
    """Raises unless `x` has exactly this shape."""
    if x.shape != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} ({meaning}), got {x.shape}"
            + (indexing(name, x.shape, shape, exactly=True) or cure)
        )


def broadcast(name: str, x: Array, shape: Sequence[int], meaning: str, cure: str = "") -> Array:
    """`x` broadcast to `shape`; `x` must not have more axes or larger ones."""
    if not _fits(x.shape, shape):
        raise ValueError(
            f"{name} must be broadcastable to {tuple(shape)} ({meaning}), got {x.shape}"
            + (cure or indexing(name, x.shape, shape))
        )
    return jnp.broadcast_to(x, shape)


def of_rows(name: str, x: Array, shape: Sequence[int], meaning: str) -> Array:
    """`x` broadcast to `shape`; `x` must have all axes of `shape`, or be a scalar.

    For a loss `[B, B]`, an array `[B]` could belong to either axis.
    """
    if x.ndim not in (0, len(shape)) or not _fits(x.shape, shape):
        raise ValueError(
            f"{name} must have the axes of {tuple(shape)} ({meaning}), each of that size or 1, or "
            f"be a scalar, got {x.shape}" + indexing(name, x.shape, shape)
        )
    return jnp.broadcast_to(x, shape)


def not_spread(name: str, x: Array, cure: str) -> None:
    """Raises where an array is sharded over explicit mesh axes: it is to be read in blocks."""
    if sharded.is_spread(x):
        spec = jax.typeof(x).sharding.spec
        raise ValueError(
            f"{name} must not be sharded over explicit mesh axes, as it is read in blocks; got "
            f"{spec}: {cure}"
        )


def mask(where: ArrayLike | None, shape: Sequence[int], meaning: str) -> Array | None:
    """A bool `where`, broadcast as by `of_rows`; None if there is none."""
    if where is None:
        return None
    return of_rows("where", boolean("where", where), shape, meaning)


def included(where: ArrayLike | None, shape: Sequence[int], meaning: str) -> Array:
    """A `mask` that is True everywhere if there is none."""
    return of_rows("where", boolean("where", True if where is None else where), shape, meaning)


def both(counts: Array | None, more: Array) -> Array:
    """Where both masks are True; `counts` is None if it excludes nothing."""
    return more if counts is None else counts & more


def rows_to_include(where: Array, rows: Sequence[int], name: str, shape: Sequence[int]) -> Array:
    """A `where` that does not have the axes of `name`, of this shape, broadcast to the loss."""
    if where.ndim not in (0, len(rows)) or not _fits(where.shape, rows):
        by_row, by_class = (indexing("where", where.shape, x) for x in (rows, shape))
        raise ValueError(
            f"where must have the axes of the loss, {tuple(rows)}, or of {name}, {tuple(shape)}, "
            f"each of that size or 1, or be a scalar, got {where.shape}"
            + by_row.replace("write", "for rows write")
            + by_class.replace("write", f"for an axis of {name} write")
        )
    return jnp.broadcast_to(where, rows)


def _fits(shape: Sequence[int], onto: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(have in (1, want) for have, want in pairs)


def indexing(
    name: str, shape: Sequence[int], wanted: Sequence[int], *, exactly: bool = False
) -> str:
    """Advice for an array with missing or superfluous axes of size 1; may be empty.

    What it leads to fits the wanted shape, or has it `exactly`.
    """
    shape, wanted = tuple(shape), tuple(wanted)
    more = len(wanted) - len(shape)
    if more == 0 or not shape:
        return ""
    if more > 0:
        axes, new = [":"] * len(shape), ["None"] * more
        ways = {(*axes, *new): (*shape, *[1] * more), (*new, *axes): (*[1] * more, *shape)}
    else:
        axes, ones = [":"] * len(wanted), (1,) * -more
        ways = {(*axes, *["0"] * -more): shape[:more]} if shape[more:] == ones else {}
        if shape[:-more] == ones:
            ways[(*["0"] * -more, *axes)] = shape[-more:]
    fits = operator.eq if exactly else _fits
    found = [f"{name}[{', '.join(way)}]" for way, have in ways.items() if fits(have, wanted)]
    return "; write " + " or ".join(found) if found else ""


def axes(axis: Axes, ndim: int, name: str = "axis", of: str = "the array") -> tuple[int, ...]:
    """An argument as a tuple of distinct non-negative axes; None means all of them."""
    static = hashable_axes(name, axis)
    if static is None:
        return tuple(range(ndim))
    wanted = static if isinstance(static, tuple) else (static,)
    if not all(-ndim <= a < ndim for a in wanted):
        raise ValueError(f"{name} must name axes of {of}, which has {ndim} axes, got {axis}")
    found = tuple(a % ndim for a in wanted)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"{name} must name at least one axis, and no axis twice, got {axis}")
    return found


def static_axis(axis: Axes) -> int | tuple[int, ...] | None:
    """The argument `axis` in a hashable form."""
    cure = ""
    if isinstance(axis, jax.Array | np.ndarray):
        cure = (
            "; write weight= for weights of classes, sample_weight= of examples, where= for a mask"
        )
    elif isinstance(axis, str) and axis in REDUCTIONS:
        cure = f"; write reduction={axis!r}"
    return hashable_axes("axis", axis, cure)


def hashable_axes(name: str, axis: Any, cure: str = "") -> int | tuple[int, ...] | None:
    """None, an int or, of a sequence of ints, a tuple; the ints may be NumPy's."""
    if axis is None:
        return None
    several = isinstance(axis, Sequence) and not isinstance(axis, str)
    given = tuple(axis) if several else (axis,)
    if not all(map(_is_index, given)):
        got = f"an array of shape {axis.shape}" if hasattr(axis, "shape") else repr(axis)
        cure = compiled_in(axis) or cure
        raise TypeError(f"{name} must be an int or a tuple of ints, got {got}{cure}")
    return tuple(map(operator.index, given)) if several else operator.index(axis)


def _is_index(x: Any) -> bool:
    known = hasattr(x, "__index__") and not isinstance(x, bool | np.bool_ | jax.core.Tracer)
    return known and getattr(x, "shape", ()) == ()


def of_32_bits(ids: Array) -> Array:
    """Ids of at least 32 bits: a number of classes may not fit into 8 or 16."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def equal(ids: Array, value: int | None) -> Array | None:
    """Where ids are equal to a constant; None if there is none, or their dtype cannot hold it."""
    limits = jnp.iinfo(ids.dtype)
    if value is None or not limits.min <= value <= limits.max:
        return None
    return jnp.equal(ids, value)


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of these."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def integer_option(name: str, value: int | None) -> int | None:
    """None, or an `int_option`."""
    return None if value is None else int_option(name, value, "an int or None")


def int_option(name: str, value: int, wanted: str = "an int") -> int:
    """`value` as a Python int: it takes part in the compiled function as a constant."""
    if isinstance(value, bool | jax.core.Tracer) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {value!r}{compiled_in(value)}")
    return int(value)


def random_key(name: str, key: PRNGKeyArray) -> PRNGKeyArray:
    """`key`, if it is one key of `jax.random`, typed or as an array of integers."""
    dtype = getattr(key, "dtype", np.dtype(bool))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed or dtype == jnp.uint32) or key.ndim != (0 if typed else 1):
        got = f"{dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(f"{name} must be one key, such as jax.random.key(0), got {got}")
    return key


def positive_int(name: str, value: int) -> int:
    """An `int_option` of at least 1."""
    number = int_option(name, value)
    if number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return number


def kernel_axis(hidden: Array, kernel: Array, axis: int, prefix: str = "") -> int:
    """The axis of `kernel` that holds the classes, if the other one fits `hidden`.

    The prefix is that of the arguments' names.
    """
    if hidden.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"{prefix}hidden must have shape [..., D] and {prefix}kernel two axes, of D and of the "
            f"classes; got {hidden.shape} and {kernel.shape}"
        )
    of_kernel, of_hidden = (jnp.finfo(x.dtype).bits for x in (kernel, hidden))
    if kernel.dtype != hidden.dtype and of_kernel <= of_hidden:
        raise TypeError(
            f"{prefix}kernel must have the dtype of {prefix}hidden, {hidden.dtype}, or a wider "
            f"one, got {kernel.dtype}; cast one of them"
        )
    if axis not in (-2, -1, 0, 1):
        raise ValueError(
            f"{prefix}class_axis must be an axis of {prefix}kernel, 0 or 1 (or -1), got {axis}"
        )
    axis %= 2
    width = hidden.shape[-1]
    if kernel.shape[1 - axis] != width or 0 in kernel.shape:
        cure = ""
        if kernel.shape[axis] == width and 0 not in kernel.shape:
            cure = f"; write {prefix}class_axis={1 - axis} for a kernel of shape "
            cure += "[V, D]" if axis else "[D, V]"
        raise ValueError(
            f"{prefix}kernel must have shape {'[D, V]' if axis else '[V, D]'} with D = {width}, "
            f"the last axis of {prefix}hidden, and V > 0, got {kernel.shape}{cure}"
        )
    return axis


def class_count(value: int | None, held: int) -> int:
    """The value of `num_classes`: by default all that the kernel holds."""
    if value is not None and not 0 < value <= held:
        raise ValueError(f"num_classes must be in [1, {held}], the classes of kernel, got {value}")
    return held if value is None else value


def memory_budget(value: int | None) -> int | None:
    """The value of `memory_budget`, in bytes."""
    value = integer_option("memory_budget", value)
    return None if value is None else positive_int("memory_budget", value)


def maybe_function(name: str, x: _Function) -> _Function:
    """`x`, if it is a function or None."""
    if x is not None and not callable(x):
        raise TypeError(
            f"{name} must be a function or None, got {reprlib.repr(x)}; give the function itself, "
            "with its options by functools.partial"
        )
    return x


def log_prob_loss(function: Callable[[Array], Array], one: Array) -> None:
    """Raises unless `function` turns one number into one number of the same dtype."""
    out = jax.eval_shape(function, one)
    if getattr(out, "shape", None) != ():
        raise ValueError(
            f"log_prob_loss must return one number for one log-probability, got {out}; use "
            "sample_weight for a factor that differs between rows"
        )
    if out.dtype != one.dtype:
        raise TypeError(
            f"log_prob_loss must return the dtype of its argument, {one.dtype}, got {out.dtype}"
        )
