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
import numpy as np
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.types import ArrayLike, Scalar
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
    return _self_information(checks.floating("p", p), _log_base(base))


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
    p = checks.floating("p", p)
    return _entropy(p, _log_base(base), checks.axes(axis, p.ndim))


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
    return _binary_entropy(checks.floating("p", p), _log_base(base))


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
    p, q = checks.floating("p", p), checks.floating("q", q)
    checks.shape_is("q", q, p.shape, "that of p")
    return _cross_entropy(p, q, _log_base(base), checks.axes(axis, p.ndim))


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
    p, q = checks.floating("p", p), checks.floating("q", q)
    checks.shape_is("q", q, p.shape, "that of p")
    return _kl_divergence(p, q, _log_base(base), checks.axes(axis, p.ndim))


@jax.jit
def _self_information(p: Array, log_base: Array | float) -> Array:
    (p,) = _wide(p)
    return _in_base(_surprise(p), log_base)


@functools.partial(jax.jit, static_argnames="axes")
def _entropy(p: Array, log_base: Array | float, axes: tuple[int, ...]) -> Array:
    (p,) = _wide(p)
    return _in_base(jnp.sum(_entropy_terms(p), axis=axes), log_base)


@jax.jit
def _binary_entropy(p: Array, log_base: Array | float) -> Array:
    (p,) = _wide(p)
    return _in_base(_binary_entropy_terms(p), log_base)


@functools.partial(jax.jit, static_argnames="axes")
def _cross_entropy(p: Array, q: Array, log_base: Array | float, axes: tuple[int, ...]) -> Array:
    p, q = _wide(p, q)
    return _in_base(jnp.sum(_cross_entropy_terms(p, q), axis=axes), log_base)


@functools.partial(jax.jit, static_argnames="axes")
def _kl_divergence(p: Array, q: Array, log_base: Array | float, axes: tuple[int, ...]) -> Array:
    p, q = _wide(p, q)
    return _in_base(_kl_sum(p, q, axes), log_base)


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


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(wide(*(x.dtype for x in arrays))) for x in arrays)


def _in_base(nats: Array, log_base: Array | float) -> Array:
    return nats / jnp.asarray(log_base).astype(nats.dtype)


def _log_base(base: Scalar) -> Array | float:
    # On the host: log(e) is 1 exactly, and no base is rounded to float32 before its logarithm.
    x = base if isinstance(base, jax.core.Tracer) else np.asarray(base)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"base must be a real number, got {base!r}")
    if x.shape != ():
        raise ValueError(f"base must be a scalar, got shape {x.shape}")
    if isinstance(x, jax.core.Tracer):
        return jnp.log(x)
    value = float(x)
    if not 0 < value < math.inf or value == 1:
        raise ValueError(f"base must be a positive number other than 1, got {base}")
    return math.log(value)
