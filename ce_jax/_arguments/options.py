"""Float options that may be traced: checked where their value is known."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .._rows.dtypes import wide
from .._rows.numerics import relative, tempered
from . import checks
from .compiled import numeric
from .types import ArrayLike

# The smallest temperature: below, logits of ordinary size overflow.
_COLDEST = 1e-6
# A number below this is finite in float32.
_LARGE = 1e38
# A log-probability this little above 0 is one that was rounded.
_ROUNDING = 1e-3


def option(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Any:
    """`value` as given, if it is real and, where it is known, finite and in `[low, high]`."""
    if isinstance(value, float) and low <= value <= high and abs(value) < _LARGE:
        return value  # without NumPy: defaults are checked in every call
    given = numeric(name, value)
    dtype = np.dtype(bool) if given is None else jnp.result_type(given)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    known = known_value(name, given)
    if known is not None:
        with np.errstate(over="ignore"):  # to inf, which is refused
            x = known.astype(dtype).astype(np.float64)
        least, most = (_as_stored(bound, dtype) for bound in (low, high))
        if not np.all((x >= least) & (x <= most) & np.isfinite(x)):
            within = "" if (low, high) == (-math.inf, math.inf) else f" and in [{low}, {high}]"
            raise ValueError(f"{name} must be finite{within}, got {value}")
    return given


def scalar(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Any:
    """A scalar `option`."""
    given = option(name, value, low, high)
    if jnp.ndim(given) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(given)}")
    return given


def not_zero(name: str, value: ArrayLike, high: float = math.inf) -> ArrayLike | None:
    """A scalar of at least 0, as given; None where it is known to be 0 and so has no effect."""
    if _is_number(value, 0):
        return None
    given = scalar(name, value, 0.0, high)
    return None if known_value(name, given) == 0 else given


def known_value(name: str, value: ArrayLike) -> np.ndarray | None:
    """The numbers as given; None if they are traced, or not all on devices of this process.

    Not read from an array made of them: under `jit` that is traced.
    """
    given = numeric(name, value)
    if isinstance(given, jax.core.Tracer):
        return None
    return np.asarray(given) if getattr(given, "is_fully_addressable", True) else None


def _as_stored(bound: float, dtype: np.dtype) -> float:
    """`bound` rounded to this dtype, so that a value equal to it is within the range."""
    return float(np.asarray(bound, dtype)) if jnp.issubdtype(dtype, jnp.floating) else bound


def soft_cap(name: str, value: ArrayLike | None) -> ArrayLike | None:
    """The value of a soft cap, which has no number that means "none"."""
    cap = None if value is None else not_zero(name, value)
    if cap is None and value is not None:
        raise ValueError(f"{name} must be positive, got {value}; write {name}=None for no cap")
    return cap


def temperature(value: ArrayLike) -> ArrayLike | None:
    """A temperature, or one per row; None where it is known to be 1 and so has no effect."""
    return None if _is_number(value, 1) else option("temperature", value, low=_COLDEST)


def _is_number(value: ArrayLike, number: int) -> bool:
    """Without making an array: defaults are checked in every call."""
    return isinstance(value, float | int) and not isinstance(value, bool) and value == number


def row_temperature(
    temperature: Array | None,
    rows: tuple[int, ...],
    dtype: DTypeLike,
    counts: Bool[Array, "*rows"] | None = None,
) -> Float[Array, "*rows"] | None:
    """The temperature of each row, 1 in those that do not count."""
    if temperature is None:
        return None
    given = checks.of_rows("temperature", temperature.astype(dtype), rows, "the loss")
    return given if counts is None else jnp.where(counts, given, 1)


def tempered_logits(
    z: Float[Array, "*rows classes"],
    temperature: Array | None,
    counts: Bool[Array, "*rows"] | None,
) -> Float[Array, "*rows classes"]:
    """Logits in the dtype of the loss, over the temperature of their rows.

    With one, relative to the largest of the row: for what depends on their differences alone.
    """
    given = row_temperature(temperature, z.shape[:-1], z.dtype, counts)
    return z if given is None else tempered(relative(z), given)


def tempered_elements(
    z: Float[Array, "..."], temperature: Array | None, counts: Bool[Array, "..."] | None
) -> Float[Array, "..."]:
    """The same where each logit is a row of its own."""
    given = row_temperature(temperature, z.shape, z.dtype, counts)
    return z if given is None else tempered(z[..., None], given)[..., 0]


def log_probability(name: str, x: ArrayLike) -> Float[Array, "..."]:
    """`x` in the loss's dtype; NaN where it is above 0 by more than rounding explains."""
    x = checks.floating(name, x)
    x = x.astype(wide(x.dtype))
    x = x * jnp.where(x > _ROUNDING, jnp.nan, 1).astype(x.dtype)
    return jnp.where(x > 0, 0, x)
