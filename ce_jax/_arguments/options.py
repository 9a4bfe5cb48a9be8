"""Float options that may be traced: checked where their value is known."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .._rows.dtypes import wide
from .._rows.numerics import tempered, tempered_rows
from . import checks
from .types import ArrayLike

# The smallest temperature: below, logits of ordinary size overflow.
_COLDEST = 1e-6
# A log-probability this little above 0 is one that was rounded.
_ROUNDING = 1e-3


def option(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """`value` as an array, if it is real and, where it is known, finite and in `[low, high]`."""
    array = checks.real(name, value)
    if array.dtype == jnp.bool_:
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not isinstance(array, jax.core.Tracer):
        known = np.asarray(array, np.float64)
        least, most = (_as_stored(bound, array.dtype) for bound in (low, high))
        if not np.all((known >= least) & (known <= most) & np.isfinite(known)):
            raise ValueError(f"{name} must be finite and in [{low}, {high}], got {value}")
    return array


def _as_stored(bound: float, dtype: jnp.dtype) -> float:
    """`bound` rounded to this dtype, so that a value equal to it is within the range."""
    return float(np.asarray(bound, dtype)) if jnp.issubdtype(dtype, jnp.floating) else bound


def scalar(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """A scalar `option`."""
    array = option(name, value, low, high)
    if array.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}")
    return array


def temperature(value: ArrayLike) -> Array | None:
    """A temperature, or one per row; None where it is known to be 1 and so has no effect."""
    if isinstance(value, float | int) and not isinstance(value, bool) and value == 1:
        return None
    return option("temperature", value, low=_COLDEST)


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
    """Logits in the dtype of the loss, over the temperature of their rows."""
    given = row_temperature(temperature, z.shape[:-1], z.dtype, counts)
    return z if given is None else tempered_rows(z, given)


def tempered_elements(
    z: Float[Array, "..."], temperature: Array | None, counts: Bool[Array, "..."] | None
) -> Float[Array, "..."]:
    """The same where each logit is a row of its own."""
    given = row_temperature(temperature, z.shape, z.dtype, counts)
    return z if given is None else tempered(z[..., None], given)[..., 0]


def positive_int(name: str, value: int) -> int:
    """`value`, if it is an int of at least 1."""
    number = checks.integer_option(name, value, "an int")
    if number is None or number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return number


def log_probability(name: str, x: ArrayLike) -> Float[Array, "..."]:
    """`x` in the loss's dtype; NaN where it is above 0 by more than rounding explains."""
    x = checks.floating(name, x)
    x = x.astype(wide(x.dtype))
    x = x * jnp.where(x > _ROUNDING, jnp.nan, 1).astype(x.dtype)
    return jnp.where(x > 0, 0, x)
