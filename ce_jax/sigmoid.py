"""Sigmoid (binary) cross-entropy of logits, with the fused derivative."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from . import _checks, _reduction, _target
from ._row_loss import weighted


def sigmoid_binary_cross_entropy(
    logits: Shaped[ArrayLike, "..."],
    labels: Shaped[ArrayLike, "..."],
    *,
    weight: Shaped[ArrayLike, "..."] | None = None,
    pos_weight: Shaped[ArrayLike, "..."] | None = None,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    where: Shaped[ArrayLike, "..."] | None = None,
    label_smoothing: Shaped[ArrayLike, "..."] = 0.0,
    reduction: str = "none",
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    r"""Cross-entropy between sigmoid(logits) and binary labels, element by element, in nats.

    For logits :math:`z`, labels :math:`q` smoothed to
    :math:`y = (1 - \epsilon) q + \epsilon / 2`, weights :math:`w` and positive weights :math:`v`:

    .. math::
      \ell = w \left( v\, y \log(1 + e^{-z}) + (1 - y) \log(1 + e^{z}) \right)

    With no option set the gradient is :math:`\sigma(z) - y`. Infinite logits give 0 or +inf, as
    the label has it, never NaN.

    Args:
      logits: log-odds of the positive class, floating, of any shape.
      labels: numbers in [0, 1], of any real dtype; broadcast together with `logits`.
      weight: weight of each element, broadcastable to the loss (`[C]`: one for each class).
      pos_weight: weight of the positive part, broadcastable to the loss.
      sample_weight: weight of each element, broadcastable to the loss; unlike `weight` it also
        counts in the denominator of the mean. A weight of 0 silences a loss of inf or NaN.
      where: bool, broadcastable to the loss: elements to include. Others are 0, also in gradient.
      label_smoothing: share of the label that is spread evenly over both classes, in [0, 1]. May
        be traced.
      reduction: "none"; "sum"; or "mean", the sum over `sum(sample_weight)` of the elements that
        count (0 if that is 0).
      forward_mode: let JAX derive the derivative instead of using the fused one, so that
        `jax.jvp`, `jax.jacfwd` and `jax.linearize` work.

    Returns:
      The loss, of the broadcast shape or `[]`, in float32 (float64 for float64 logits).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ce_jax
      >>> print(ce_jax.sigmoid_binary_cross_entropy(jnp.array([2.0, -1.0]), jnp.array([1, 0])))
      [0.1269 0.3133]
      >>> print(jax.grad(ce_jax.sigmoid_binary_cross_entropy)(0.0, 1.0))
      -0.5

    References:
      Goodfellow, Bengio and Courville, `Deep Learning`, 2016, section 6.2.2.2.
    """
    _checks.reduction(reduction)
    return _loss(
        logits,
        labels,
        weight,
        pos_weight,
        sample_weight,
        where,
        _checks.float_option("label_smoothing", label_smoothing, 0.0, 1.0),
        reduction=reduction,
        forward_mode=forward_mode,
    )


@functools.partial(jax.jit, static_argnames=("reduction", "forward_mode"), inline=True)
def _loss(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None,
    pos_weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    where: ArrayLike | None,
    label_smoothing: ArrayLike | None,
    *,
    reduction: str,
    forward_mode: bool,
) -> Array:
    z, y, counts = _target.elements("logits", logits, labels, where, label_smoothing)
    sample_weight = _reduction.weights("sample_weight", sample_weight, y.shape, y.dtype)
    if sample_weight is not None:
        z = jnp.where((sample_weight == 0) & jnp.isnan(z), 0, z)
    positive, negative = y, 1 - y
    pos_weight = _reduction.weights("pos_weight", pos_weight, y.shape, y.dtype)
    if pos_weight is not None:
        positive = positive * pos_weight
    loss = (logistic if forward_mode else _fused)(z, positive, negative)

    weight = _reduction.weights("weight", weight, loss.shape, loss.dtype)
    if weight is not None:
        loss = weighted(weight, loss)
    return _reduction.reduce(loss, counts, sample_weight, reduction)


def logistic(
    z: Float[Array, "*shape"], positive: Float[Array, "*shape"], negative: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`positive * log(1 + exp(-z)) + negative * log(1 + exp(z))`, for any z and coefficients.

    With `u = exp(-|z|)` the two logarithms are `log(1 + u)`, one of them plus `|z|`.
    """
    away = _minus_abs(z.astype(positive.dtype))
    slope = jnp.where(z > 0, negative, positive)
    linear = jnp.where(slope == 0, 0, away) * slope
    return (positive + negative) * jnp.log1p(jnp.exp(away)) - linear


_fused = jax.custom_vjp(logistic)

_Residuals = tuple[ArrayLike, ArrayLike, ArrayLike]


def _fused_fwd(z: Array, positive: Array, negative: Array) -> tuple[Array, _Residuals]:
    return logistic(z, positive, negative), (z, positive, negative)


def _fused_bwd(residuals: _Residuals, g: Array) -> tuple[Array, Array, Array]:
    """`p - y` for the coefficients `y` and `1 - y`; in general `negative p - positive (1 - p)`."""
    z, positive, negative = map(jnp.asarray, residuals)  # a scalar may come as a literal
    away = _minus_abs(z.astype(positive.dtype))
    u = jnp.exp(away)
    up = z > 0
    dz = jnp.where(up, negative - positive * u, negative * u - positive) / (1 + u)
    near = jnp.log1p(u)
    far = near - away
    d_positive = g * jnp.where(up, near, far)
    d_negative = g * jnp.where(up, far, near)
    return (g * dz).astype(z.dtype), d_positive, d_negative


_fused.defvjp(_fused_fwd, _fused_bwd)


def _minus_abs(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`-|z|`, with a derivative at 0 that makes the derivatives built on it right at 0."""
    return jnp.where(z > 0, -z, z)
