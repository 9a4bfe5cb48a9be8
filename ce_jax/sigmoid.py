"""Sigmoid (binary) cross-entropy of logits, with the fused derivative."""

from __future__ import annotations

import functools
import math

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
    z, y, counts = _target.elements("logits", logits, labels, where, label_smoothing, sample_weight)
    positive, negative = y, None
    pos_weight = _reduction.weights("pos_weight", pos_weight, y.shape, y.dtype)
    if pos_weight is not None:
        positive, negative = y * pos_weight, 1 - y
    loss = (logistic if forward_mode else _fused)(z, positive, negative)
    weight = _reduction.weights("weight", weight, loss.shape, loss.dtype)
    if weight is not None:
        loss = weighted(weight, loss)
    sample_weight = _reduction.weights("sample_weight", sample_weight, loss.shape, loss.dtype)
    return _reduction.reduce(loss, counts, sample_weight, reduction)


def _loss_of(
    z: Float[Array, "*shape"],
    positive: Float[Array, "*shape"],
    negative: Float[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """`positive * log(1 + exp(-z)) + negative * log(1 + exp(z))`, for any z and coefficients.

    Both logarithms are `log(1 + exp(-|z|))`, one of them plus `|z|`. Without `negative`, that is
    `1 - positive`.
    """
    z = z.astype(positive.dtype)
    near = jnp.log1p(jnp.exp(-jnp.abs(z)))
    if negative is None:
        negative = 1 - positive
    else:
        near = (positive + negative) * near
    slope = jnp.where(z > 0, negative, -positive)
    return jnp.where(slope == 0, 0, slope * z) + near


_Elements = tuple[ArrayLike, ArrayLike, ArrayLike | None]


def _slopes(elements: _Elements) -> tuple[Array, Array, Array]:
    """Derivatives of `_loss_of`: `p - y` for the coefficients `y` and `1 - y`, and so on.

    With `p = 1 / (1 + e)` and `1 - p = e p` neither loses digits to a subtraction, and there is no
    select to keep a CPU from computing it in one pass. The exponent is bounded, as `inf * 0` would
    be NaN (and `p` has to stay a normal number); a factor of 0 removes what is left of `p` at -inf.
    """
    z, positive = jnp.asarray(elements[0]), jnp.asarray(elements[1])  # scalars come as literals
    negative = 1 - positive if elements[2] is None else jnp.asarray(elements[2])
    z = z.astype(positive.dtype)
    most = float(jnp.finfo(z.dtype).max)
    e = jnp.exp(-jnp.maximum(z, -0.98 * math.log(most)))
    p = 1 / (1 + e)
    above = jnp.minimum(jnp.maximum(z + most, 0), 1)
    return negative * (above * p) - positive * (e * p), jax.nn.softplus(-z), jax.nn.softplus(z)


_fused = jax.custom_vjp(_loss_of)


def _fused_fwd(z: Array, positive: Array, negative: Array | None = None) -> tuple[Array, _Elements]:
    return _loss_of(z, positive, negative), (z, positive, negative)


def _fused_bwd(elements: _Elements, g: Array) -> tuple[Array, Array, Array | None]:
    dz, d_positive, d_negative = (g * d for d in _slopes(elements))
    dz = dz.astype(jnp.result_type(elements[0]))
    return (
        (dz, d_positive - d_negative, None) if elements[2] is None else (dz, d_positive, d_negative)
    )


_fused.defvjp(_fused_fwd, _fused_bwd)

# Forward mode needs the slopes by a rule too: JAX's own derivative of |z| is wrong at 0.
logistic = jax.custom_jvp(_loss_of)


@logistic.defjvp
def _logistic_jvp(elements: _Elements, tangents: _Elements) -> tuple[Array, Array]:
    dz, d_positive, d_negative = _slopes(elements)
    t_z, t_positive, t_negative = tangents
    z, positive, negative = (x if x is None else jnp.asarray(x) for x in elements)
    loss = _loss_of(jnp.asarray(z), jnp.asarray(positive), negative)
    t_z = jnp.asarray(t_z).astype(dz.dtype)
    if t_negative is None:
        return loss, dz * t_z + (d_positive - d_negative) * t_positive
    return loss, dz * t_z + d_positive * t_positive + d_negative * t_negative
