"""Information theory on probabilities: entropy, cross-entropy and Kullback-Leibler divergence.

These functions take probabilities; the losses take logits. Compute a model's loss from its logits,
because a probability has already lost digits to rounding and underflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.compiled import compiled
from ._arguments.options import known_value, scalar
from ._arguments.types import ArrayLike, Axes, Scalar
from ._rows.dtypes import wide
from ._rows.numerics import directional, inverse, log_complement, polynomial, pushed

# 1/17, ..., 1/5, 1/3: the series of `_kl_terms`. With |s| <= 1/8 the first term left out is below
# float64's rounding.
_SERIES = tuple(1.0 / k for k in range(17, 1, -2))


def self_information(p: ArrayLike, *, base: Scalar = math.e) -> Float[Array, "..."]:
    r"""Information (surprise) of an outcome with probability p.

    .. math:: I(p) = -\log_b p

    Args:
      p: probabilities, of any shape.
      base: base of the logarithm: e for nats, 2 for bits, 10 for bans, or any positive number
        but 1. It may be a traced value.

    Returns:
      An array of the shape of `p`: float64 for float64 input, otherwise float32. An impossible
      outcome (p = 0) has infinite information; a negative p gives NaN.

    Raises:
      TypeError: if `p` is not of a floating dtype, or `base` is not a real number.
      ValueError: if `base` is not a scalar, not positive, or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import ce_jax
      >>> print(ce_jax.self_information(jnp.array([0.5, 0.25, 0.125]), base=2))
      [1. 2. 3.]

    References:
      C. E. Shannon, A Mathematical Theory of Communication, 1948.
    """
    return _self_information(p, _log_base(base))


def entropy(
    p: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    *,
    base: Scalar = math.e,
) -> Float[Array, "..."]:
    r"""Entropy of a distribution: its mean information.

    .. math:: H(p) = -\sum_c p_c \log_b p_c, \qquad 0 \log 0 = 0

    The gradient is :math:`-(\log p_c + 1)`, which is :math:`+\infty` at 0. For the entropy of a
    softmax use `softmax_statistics(...).entropy`: its gradient stays finite where probabilities
    underflow.

    Args:
      p: probabilities, which sum to 1 over `axis`; they are not normalised here.
      axis: the axis or axes summed over; None stands for all.
      base: base of the logarithm: e for nats, 2 for bits, 10 for bans, or any positive number
        but 1. It may be a traced value.

    Returns:
      An array of the shape of `p` without `axis`: float64 for float64 input, otherwise float32. A
      negative p (a log-probability passed by mistake, for example) gives NaN.

    Raises:
      TypeError: if `p` is not of a floating dtype, `axis` no integer, or `base` no real number.
      ValueError: if `axis` is out of range or repeated, or `base` is not a scalar, not positive,
        or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import ce_jax
      >>> print(ce_jax.entropy(jnp.array([0.5, 0.25, 0.25, 0.0]), base=2))
      1.5

    References:
      C. E. Shannon, A Mathematical Theory of Communication, 1948.
    """
    return _entropy(p, _log_base(base), axis=checks.static_axis(axis))


def binary_entropy(p: ArrayLike, *, base: Scalar = math.e) -> Float[Array, "..."]:
    r"""Entropy of a binary outcome with probability p.

    .. math:: H(p) = -p \log_b p - (1 - p) \log_b (1 - p)

    Accurate down to the smallest p; the gradient :math:`\log_b((1 - p) / p)` is infinite at 0
    and 1.

    Args:
      p: probabilities, of any shape.
      base: base of the logarithm: e for nats, 2 for bits, 10 for bans, or any positive number
        but 1. It may be a traced value.

    Returns:
      An array of the shape of `p`: float64 for float64 input, otherwise float32. A p outside
      [0, 1] gives NaN.

    Raises:
      TypeError: if `p` is not of a floating dtype, or `base` is not a real number.
      ValueError: if `base` is not a scalar, not positive, or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import ce_jax
      >>> print(ce_jax.binary_entropy(jnp.array([0.0, 0.5, 1.0]), base=2))
      [0. 1. 0.]

    References:
      C. E. Shannon, A Mathematical Theory of Communication, 1948.
    """
    return _binary_entropy(p, _log_base(base))


def cross_entropy(
    p: ArrayLike,
    q: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    *,
    base: Scalar = math.e,
) -> Float[Array, "..."]:
    r"""Mean information of outcomes drawn from p, measured with the probabilities q.

    .. math:: H(p, q) = -\sum_c p_c \log_b q_c, \qquad 0 \log 0 = 0

    It equals `entropy(p) + kl_divergence(p, q)`. Both arguments are probabilities; from logits,
    use `softmax_cross_entropy(logits, p)`.

    Args:
      p: the true probabilities.
      q: the predicted probabilities, of the same shape.
      axis: the axis or axes summed over; None stands for all.
      base: base of the logarithm: e for nats, 2 for bits, 10 for bans, or any positive number
        but 1. It may be a traced value.

    Returns:
      An array of the shape of `p` without `axis`: float64 if either input is, otherwise float32.
      It is infinite where q is 0 and p is not. A negative probability gives NaN.

    Raises:
      TypeError: if `p` or `q` is not of a floating dtype, `axis` no integer, or `base` no real
        number.
      ValueError: if the shapes differ, `axis` is out of range or repeated, or `base` is not a
        scalar, not positive, or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import ce_jax
      >>> p = jnp.array([0.0, 1.0, 0.0])
      >>> print(ce_jax.cross_entropy(p, jnp.array([0.25, 0.5, 0.25]), base=2))
      1.0

    References:
      C. E. Shannon, A Mathematical Theory of Communication, 1948.
    """
    return _cross_entropy(p, q, _log_base(base), axis=checks.static_axis(axis))


def kl_divergence(
    p: ArrayLike,
    q: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    *,
    base: Scalar = math.e,
) -> Float[Array, "..."]:
    r"""Kullback-Leibler divergence (relative entropy): information lost when q is used for p.

    .. math:: D(p \| q) = \sum_c p_c \log_b \frac{p_c}{q_c}, \qquad 0 \log 0 = 0

    Both arguments are probabilities, the true ones first. `optax.losses.kl_divergence` takes
    `(log_predictions, targets)` instead: `kl_divergence(targets, jnp.exp(log_predictions))` is its
    value. It is accurate also where p is close to q. Inputs whose sum is 1 only up to rounding may
    give a value just below 0.

    Args:
      p: the true probabilities.
      q: the predicted probabilities, of the same shape.
      axis: the axis or axes summed over; None stands for all.
      base: base of the logarithm: e for nats, 2 for bits, 10 for bans, or any positive number
        but 1. It may be a traced value.

    Returns:
      An array of the shape of `p` without `axis`: float64 if either input is, otherwise float32.
      It is infinite where q is 0 and p is not. A negative probability gives NaN.

    Raises:
      TypeError: if `p` or `q` is not of a floating dtype, `axis` no integer, or `base` no real
        number.
      ValueError: if the shapes differ, `axis` is out of range or repeated, or `base` is not a
        scalar, not positive, or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import ce_jax
      >>> p = jnp.array([1.0, 0.0])
      >>> print(ce_jax.kl_divergence(p, jnp.array([0.25, 0.75]), base=2))
      2.0

    References:
      S. Kullback and R. A. Leibler, On Information and Sufficiency, 1951.
    """
    return _kl_divergence(p, q, _log_base(base), axis=checks.static_axis(axis))


@compiled
def _self_information(p: Array, log_base: Array) -> Array:
    (p,) = _wide(p=p)
    return _surprise(p) / log_base.astype(p.dtype)


@compiled
def _entropy(p: Array, log_base: Array, *, axis: Axes) -> Array:
    (p,) = _wide(p=p)
    terms = _entropy_terms(p)
    return jnp.sum(terms, checks.axes(axis, p.ndim)) / log_base.astype(p.dtype)


@compiled
def _binary_entropy(p: Array, log_base: Array) -> Array:
    (p,) = _wide(p=p)
    return _binary_entropy_terms(p) / log_base.astype(p.dtype)


@compiled
def _cross_entropy(p: Array, q: Array, log_base: Array, *, axis: Axes) -> Array:
    p, q = _wide(p=p, q=q)
    terms = _cross_entropy_terms(p, q)
    return jnp.sum(terms, checks.axes(axis, p.ndim)) / log_base.astype(p.dtype)


@compiled
def _kl_divergence(p: Array, q: Array, log_base: Array, *, axis: Axes) -> Array:
    p, q = _wide(p=p, q=q)
    return _kl_sum(p, q, checks.axes(axis, p.ndim)) / log_base.astype(p.dtype)


# The rules below give the limits at 0 that plain differentiation turns into NaN (0 * inf).
# Logarithms are subtracted from 0, not negated, so that certainty is 0, not -0.


@jax.custom_jvp
def _surprise(p: Array) -> Array:
    return 0.0 - jnp.log(p)


@_surprise.defjvp
def _surprise_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (p,), (dp,) = primals, tangents
    return _surprise(p), pushed(-inverse(p), dp)


@jax.custom_jvp
def _entropy_terms(p: Array) -> Array:
    return jnp.where(p == 0, 0.0, p * (0.0 - jnp.log(jnp.where(p == 0, 1.0, p))))


@_entropy_terms.defjvp
def _entropy_terms_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (p,), (dp,) = primals, tangents
    return _entropy_terms(p), pushed(_surprise(p) - 1, dp)


@jax.custom_jvp
def _binary_entropy_terms(p: Array) -> Array:
    certain = p == 1
    return _entropy_terms(p) + (p - 1) * log_complement(jnp.where(certain, 0.0, p))


@_binary_entropy_terms.defjvp
def _binary_entropy_terms_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (p,), (dp,) = primals, tangents
    return _binary_entropy_terms(p), pushed(log_complement(p) + _surprise(p), dp)


@jax.custom_jvp
def _cross_entropy_terms(p: Array, q: Array) -> Array:
    p, q = _visible(p), _visible(q)
    # 0 log q is 0 for any legal q: a NaN stays.
    impossible = (p == 0) & (q >= 0)
    return jnp.where(impossible, 0.0, p * (0.0 - jnp.log(jnp.where(impossible, 1.0, q))))


@functools.partial(_cross_entropy_terms.defjvp, symbolic_zeros=True)
def _cross_entropy_terms_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    p, q = map(_visible, primals)
    tangent = directional((_surprise(q), -_ratio(p, q)), tangents)
    return _cross_entropy_terms(p, q), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl_sum(p: Array, q: Array, axes: tuple[int, ...]) -> Array:
    second_order, first_order = _kl_terms(_visible(p), _visible(q))
    return jnp.sum(second_order, axis=axes) + jnp.sum(first_order, axis=axes)


@functools.partial(_kl_sum.defjvp, symbolic_zeros=True)
def _kl_sum_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    p, q = map(_visible, primals)
    near, d = _nearness(p, q)
    # Where both are 0 the one-sided limit is +inf, not log 0 - log 0.
    far = _log_ratio(jnp.where((p == 0) & (q == 0), 1.0, p), q)
    log_ratio = jnp.where(near, jnp.log1p(d / jnp.where(near, q, 1.0)), far)
    tangent = directional((log_ratio + 1, -_ratio(p, q)), tangents)
    return _kl_sum(p, q, axes), jnp.sum(tangent, axis=axes)


def _kl_terms(p: Array, q: Array) -> tuple[Array, Array]:
    """Splits p log(p/q), where p is near q, into its second-order part and d = p - q.

    With s = d / (p + q), log(p/q) is 2 artanh(s) = 2 s (1 + t), t = s^2/3 + s^4/5 + ..., and
    p log(p/q) - d = d (s + t + s t): small terms throughout. The first-order parts cancel in the
    sum of normalised p and q, and p - q has no rounding error. Far from q, the whole term goes to
    the first part.
    """
    near, d = _nearness(p, q)
    s = d / jnp.where(near, p + q, 1.0)
    s2 = s * s
    t = s2 * polynomial(_SERIES, s2)
    impossible = (p == 0) & (q >= 0)
    safe_p, safe_q = (jnp.where(impossible, 1.0, x) for x in (p, q))
    far = jnp.where(impossible, 0.0, p * _log_ratio(safe_p, safe_q))
    return jnp.where(near, d * (s + t + s * t), far), d


@jax.custom_jvp
def _log_ratio(p: Array, q: Array) -> Array:
    """log(p / q), which has more digits than the difference of the logarithms."""
    ratio = p / q
    normal = (ratio >= jnp.finfo(p.dtype).tiny) & (ratio < jnp.inf)
    return jnp.where(normal, jnp.log(jnp.where(normal, ratio, 1.0)), jnp.log(p) - jnp.log(q))


# That of the quotient divides by the square of q, which may underflow.
@_log_ratio.defjvp
def _log_ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (p, q), (dp, dq) = primals, tangents
    return _log_ratio(p, q), pushed(inverse(p), dp) - pushed(inverse(q), dq)


def _nearness(p: Array, q: Array) -> tuple[Array, Array]:
    """Where p is within a quarter of q or so, and p - q there (0 elsewhere)."""
    near = (jnp.abs(p - q) <= (p + q) / 8) & (q > 0)
    return near, jnp.where(near, p - q, 0.0)


def _visible(p: Array) -> Array:
    """NaN where p is negative: log-probabilities passed by mistake shall not look like a result."""
    return jnp.where(p < 0, jnp.nan, p)


def _ratio(p: Array, q: Array) -> Array:
    """The quotient p / q, with 0 / 0 = 0."""
    both_zero = (p == 0) & (q == 0)
    return jnp.where(both_zero, 0.0, p / jnp.where(both_zero, 1.0, q))


def _wide(**arrays: Array) -> list[Array]:
    """The arrays, checked, in the dtype of the result."""
    found = [checks.floating(name, x) for name, x in arrays.items()]
    checks.shape_is("q", found[-1], found[0].shape, "that of p")
    return [x.astype(wide(*(y.dtype for y in found))) for x in found]


def _log_base(base: Scalar) -> Array | float:
    """On the host if it is known: log(e) is then 1, and no base is rounded before its logarithm."""
    checked, known = scalar("base", base), known_value("base", base)
    if known is None:
        return jnp.log(checked)
    if known <= 0 or known == 1:
        raise ValueError(f"base must be a positive number other than 1, got {base}")
    return math.log(known)
