"""Options that may be traced, and functions whose plain formula fails near a limit."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from .._arguments import checks
from .._arguments.types import ArrayLike
from .tile import wide

# Coefficients of (e^x - 1) / x and of (e^x - 1 - x) / x^2, highest power first. With |x| <= 1/2 the
# first term left out is below float64's rounding.
_FIRST = tuple(1.0 / math.factorial(k + 1) for k in range(14, -1, -1))
_SECOND = tuple(1.0 / math.factorial(k + 2) for k in range(14, -1, -1))
# Those of (artanh(s) / s - 1) / s^2 in s^2. With s <= 1/3 the first one left out adds below 2e-9.
_ARTANH = tuple(1.0 / (2 * k + 1) for k in range(7, 0, -1))
# A log-probability this little above 0 is one that was rounded.
_ROUNDING = 1e-3


def option(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """`value` as an array, if it is real and, where it is known, finite and in `[low, high]`."""
    array = checks.real(name, value)
    if not isinstance(array, jax.core.Tracer):
        known = np.asarray(array, np.float64)
        least, most = (_as_stored(bound, array.dtype) for bound in (low, high))
        if not np.all((known >= least) & (known <= most) & np.isfinite(known)):
            raise ValueError(f"{name} must be finite and in [{low}, {high}], got {value}")
    return array


def _as_stored(bound: float, dtype: jnp.dtype) -> float:
    """`bound` rounded as a value of this dtype was, so that one equal to it does not miss it."""
    return float(np.asarray(bound, dtype)) if jnp.issubdtype(dtype, jnp.floating) else bound


def scalar(name: str, value: ArrayLike, low: float = -math.inf, high: float = math.inf) -> Array:
    """A scalar `option`."""
    array = option(name, value, low, high)
    if array.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}")
    return array


def positive_int(name: str, value: int) -> int:
    """`value`, if it is an int of at least 1."""
    number = checks.integer_option(name, value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return number


def log_probability(name: str, x: ArrayLike) -> Float[Array, "..."]:
    """`x` in the loss's dtype; NaN where it is above 0 by more than rounding explains."""
    x = checks.floating(name, x)
    x = x.astype(wide(x.dtype))
    x = x * jnp.where(x > _ROUNDING, jnp.nan, 1).astype(x.dtype)
    return jnp.where(x > 0, 0, x)


def linear(slopes: tuple[Array, ...], tangents: tuple[Any, ...]) -> Array:
    """The sum of slope * tangent over the arguments that vary: an infinite slope times 0 is NaN.

    For rules of `jax.custom_jvp` with `symbolic_zeros`.
    """
    terms = [
        slope * jnp.asarray(tangent).astype(slope.dtype)
        for slope, tangent in zip(slopes, tangents, strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    return functools.reduce(operator.add, terms)


def _polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The polynomial with these coefficients, highest power first.

    As `jnp.polyval`, which fails where `x` is sharded over explicit mesh axes: it begins with zeros
    that are not.
    """
    highest, *others = coefficients
    return functools.reduce(lambda y, c: y * x + c, others, jnp.full_like(x, highest))


def expm1_ratio(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`(e^x - 1) / x` for |x| <= 1/2, by its series: it and its derivatives hold at 0 too."""
    return _polynomial(_FIRST, x)


def log1p_below_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log(1 + x)` for 0 <= x <= 1: in float32 on a CPU in half the time, with half the error.

    It is `2 artanh(s)` with `s = x / (2 + x)`, at most 1/3, of which eight terms are enough. As
    `2 s = x - s x`, all of it but `x` can be a small correction.
    """

    def series(x: Array) -> Array:
        s = x * (1 / (2 + x))  # so that XLA computes all of it at once
        more = s * s * _polynomial(_ARTANH, s * s)
        return x - s * (x - 2 * more)

    cpu = series if x.dtype == jnp.float32 else jnp.log1p
    found: Array = jax.lax.platform_dependent(x, cpu=cpu, default=jnp.log1p)
    return found


def one_minus_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 - e^x`; its derivatives keep their digits at both ends (those of expm1 lose e^x)."""
    near = jnp.abs(x) <= 0.5
    small, large = jnp.where(near, x, 0), jnp.where(near, -1, x)
    return jnp.where(near, -small * expm1_ratio(small), 1 - jnp.exp(large))


def expm1_less_x(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`e^x - 1 - x`, without the cancellation near 0."""
    near = jnp.abs(x) <= 0.5
    small, large = jnp.where(near, x, 0), jnp.where(near, 1, x)
    series = jnp.square(small) * _polynomial(_SECOND, small)
    return jnp.where(near, series, jnp.expm1(large) - large)


@jax.custom_jvp
def power(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x ** y` for x >= 0, with derivatives of every order that are not NaN at 0.

    Where one is infinite at 0 it is taken as 0: multiplied with the 0 by which a saturated softmax
    passes it on, that is the limit, and inf is NaN.
    """
    return x**y


@power.defjvp
def _power_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    value = power(x, y)
    flat = (y == 0) | ((x == 0) & (y < 1))
    by_x = jnp.where(flat, 0, y * power(x, jnp.where(flat, 1, y - 1)))
    by_y = jnp.where(x == 0, 0, value * jnp.log(jnp.where(x == 0, 1, x)))
    return value, by_x * dx + by_y * dy
