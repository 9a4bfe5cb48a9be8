"""Functions that are accurate where their plain formula fails."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from .dtypes import wide

_Tree = TypeVar("_Tree")

# Coefficients of (e^x - 1) / x and of (e^x - 1 - x) / x^2, highest power first. With |x| <= 1/2 the
# first term left out is below float64's rounding.
_FIRST = tuple(1.0 / math.factorial(k + 1) for k in range(14, -1, -1))
_SECOND = tuple(1.0 / math.factorial(k + 2) for k in range(14, -1, -1))


def directional(slopes: tuple[Array, ...], tangents: tuple[Any, ...]) -> Array:
    """The sum of slope * tangent over the arguments that vary, where infinity times 0 is 0.

    For rules of `jax.custom_jvp` with `symbolic_zeros`.
    """
    terms = [
        pushed(slope, jnp.asarray(tangent).astype(slope.dtype))
        for slope, tangent in zip(slopes, tangents, strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    return functools.reduce(operator.add, terms)


@jax.custom_jvp
def pushed(slope: Float[Array, "..."], tangent: Float[Array, "..."]) -> Float[Array, "..."]:
    """`slope * tangent`, linear in the tangent; 0 for a tangent of 0, even if the slope is inf."""
    most = jnp.finfo(slope.dtype).max
    return jnp.clip(slope, -most, most) * tangent * jnp.where(jnp.isinf(slope), most, 1)


@pushed.defjvp
def _pushed_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (slope, tangent), (d_slope, d_tangent) = primals, tangents
    bent = jnp.where(tangent == 0, 0, d_slope) * tangent
    return pushed(slope, tangent), bent + pushed(slope, d_tangent)


@jax.custom_jvp
def inverse(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x`, whose derivatives of every order are `pushed`."""
    return 1 / x


@inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return inverse(x), pushed(-jnp.square(inverse(x)), dx)


def instantiated(tree: _Tree) -> _Tree:
    """Cotangents, with arrays of zeros for those that JAX knows to be 0."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x, tree
    )


def weighted(weight: Float[Array, "..."], loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """`weight * loss`, and 0 where the weight is 0, even if the loss is inf or NaN."""
    return weight * silenced(weight, loss)


def silenced(weight: Float[Array, "..."] | None, x: _Tree) -> _Tree:
    """`x`, with 0 for what is not finite and weighs nothing.

    For what is multiplied by a factor before the weight: the derivative by that factor is a
    multiple of `x`, and 0 times infinity is NaN.
    """
    if weight is None:
        return x
    return jax.tree.map(lambda x: jnp.where((weight == 0) & ~jnp.isfinite(x), 0, x), x)


@jax.custom_jvp
def product(weight: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`weight * x` for x >= 0, where 0 times infinity is 0.

    An infinite `x` is first taken as the largest finite number: times a weight of 0 that is 0. For
    any other weight the product is then multiplied by that number again, which makes it infinite.
    """
    most = jnp.finfo(x.dtype).max
    bounded = jnp.minimum(x, most)
    finite = weight * bounded
    return finite + finite * jnp.minimum(x - bounded, most)


@product.defjvp
def _product_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (weight, x), (t_weight, t_x) = primals, tangents
    by_weight = jnp.where((weight == 0) & jnp.isinf(x), 0, x)
    return product(weight, x), pushed(by_weight, t_weight) + weight * t_x


def signed_product(weight: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`product` for an `x` of either sign, of rows: in a sum over classes a select is slow."""
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    return sign * product(weight, sign * x)


@jax.custom_jvp
def not_negative(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`|x|`, with the derivative of `x`, for an `x` that is negative by rounding only.

    A compiler may compute logits twice that were scaled by the user, and contract the scaling with
    what follows in one place only: the largest logit is then above the maximum by its last digit.
    (`temperature` scales in one place.)
    """
    return jnp.absolute(x)


@not_negative.defjvp
def _not_negative_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return not_negative(*primals), *tangents


@jax.custom_jvp
def tempered(
    z: Float[Array, "*rows classes"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """`z / temperature`; an infinite logit stays as it is and has no part in the slope of that.

    One division for each row: a quotient for each logit would not be computed a second time for the
    gradient, but stored. For a softmax `z` is relative to something (see `tempered_rows`).
    """
    return z * (1 / temperature)[..., None]


@tempered.defjvp
def _tempered_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, temperature), (dz, d_temperature) = primals, tangents
    quotient = tempered(z, temperature)
    finite = jnp.where(jnp.isinf(z), 0, quotient)
    slope = (d_temperature / temperature)[..., None]
    return quotient, tempered(dz, temperature) - finite * slope


def relative(z: Float[Array, "*rows classes"]) -> Float[Array, "*rows classes"]:
    """The logits less the largest of their row; all NaN if that is inf or NaN."""
    row_max = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    return z - jnp.where(jnp.isneginf(row_max), 0, row_max)


def log_softmax(z: Float[Array, "*rows classes"]) -> Float[Array, "*rows classes"]:
    """Log-probabilities in the loss's dtype; -inf logits are masked classes."""
    z = relative(z.astype(wide(z.dtype)))
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


def tempered_rows(
    z: Float[Array, "*rows classes"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """`tempered` of any logits, of which the largest is found to be the same number each time.

    A compiler may contract a product with a difference that follows, in one place only. From their
    maximum logits of 1e10 would then differ by what the product was rounded by, and exponentials
    overflow.
    """
    row_max = jax.lax.stop_gradient(jnp.max(z, -1))
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0)
    back = (row_max / temperature)[..., None]
    # An infinite logit has no part in the slope of that either.
    return tempered(z - row_max[..., None], temperature) + jnp.where(jnp.isinf(z), 0, back)


def polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The polynomial with these coefficients, highest power first.

    As `jnp.polyval`, which fails where `x` is sharded over explicit mesh axes: it begins with zeros
    that are not.
    """
    highest, *others = coefficients
    return functools.reduce(lambda y, c: y * x + c, others, jnp.full_like(x, highest))


def expm1_ratio(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`(e^x - 1) / x` for |x| <= 1/2, by its series: it and its derivatives hold at 0 too."""
    return polynomial(_FIRST, x)


@jax.custom_jvp
def quotient(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / y`, with derivatives in which no square of `y` underflows."""
    return x / y


@quotient.defjvp
def _quotient_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    found = quotient(x, y)
    return found, quotient(dx - found * dy, y)


@jax.custom_jvp
def one_minus_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 - e^x`, with the derivative `-e^x` (JAX's own, by `expm1(x) + 1`, is 0 for x < -17)."""
    return -jnp.expm1(x)


@one_minus_exp.defjvp
def _one_minus_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return one_minus_exp(x), -jnp.exp(x) * dx


@jax.custom_jvp
def log_complement(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 - p). 1 - p would round a small p away; XLA's float64 log1p is coarse below -1/4."""
    return jnp.where(p < 0.25, jnp.log1p(-p), jnp.log(1 - p))


@log_complement.defjvp
def _log_complement_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (p,), (dp,) = primals, tangents
    return log_complement(p), pushed(-inverse(1 - p), dp)


def expm1_less_small(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`e^x - 1 - x` for |x| <= 1/2, by its series."""
    return jnp.square(x) * polynomial(_SECOND, x)


def divergence_terms(
    p: Float[Array, "..."], log_p: Float[Array, "..."], log_q: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`p log(p / q) - p + q`, which is never negative and keeps its digits where p and q agree."""
    q, wanted = jnp.exp(log_q), p > 0
    log_ratio = jnp.where(wanted, log_p, 0) - jnp.where(wanted, log_q, 0)
    near = jnp.abs(log_ratio) <= 0.5
    small, large = jnp.where(near, log_ratio, 0), jnp.where(near, 0, log_ratio)
    far = p * large + (q - p)
    return jnp.where(p == 0, q, jnp.where(near, p * expm1_less_small(-small), far))


def expm1_less_x(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`e^x - 1 - x`, without the cancellation near 0."""
    near = jnp.abs(x) <= 0.5
    small, large = jnp.where(near, x, 0), jnp.where(near, 1, x)
    far = -one_minus_exp(large) - jnp.minimum(large, jnp.finfo(x.dtype).max)
    return jnp.where(near, expm1_less_small(small), far)


@jax.custom_jvp
def power(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x ** y` for x >= 0, with derivatives of every order that are not NaN at 0.

    A derivative that is infinite at 0 is taken as 0. A saturated softmax multiplies it by 0: the
    limit of that product is 0, while infinity times 0 is NaN.
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
