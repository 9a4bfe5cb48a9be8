"""Sigmoid (binary) cross-entropy of logits, with the fused derivative."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from ._arguments import checks, reductions, targets
from ._platform.narrow import narrowed
from ._platform.parts import in_long_rows, in_one_axis
from ._platform.unless import unless
from ._rows.loss import silenced, weighted
from ._rows.numerics import linear, log1p_below_one


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
      >>> losses = ce_jax.sigmoid_binary_cross_entropy(jnp.array([2.0, -1.0]), jnp.array([1, 0]))
      >>> print(losses.round(4))
      [0.1269 0.3133]
      >>> print(jax.grad(ce_jax.sigmoid_binary_cross_entropy)(0.0, 1.0))
      -0.5

    References:
      Goodfellow, Bengio and Courville, `Deep Learning`, 2016, section 6.2.2.2.
    """
    checks.reduction(reduction)
    return _loss(
        logits,
        labels,
        weight,
        pos_weight,
        sample_weight,
        where,
        checks.float_option("label_smoothing", label_smoothing, 0.0, 1.0),
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
    z, y, counts = targets.elements("logits", logits, labels, where, label_smoothing, sample_weight)
    # With an option a CPU stores arrays in any case.
    options = (weight, pos_weight, sample_weight, where, label_smoothing)
    if reduction != "none" and z.dtype == y.dtype and all(x is None for x in options):
        total = (_logistic if forward_mode else _fused)(True, z, y)
        return total if reduction == "sum" else reductions.mean(total, z.shape)
    pos_weight = reductions.weights("pos_weight", pos_weight, y.shape, y.dtype)
    sample_weight = reductions.weights("sample_weight", sample_weight, y.shape, y.dtype)
    if sample_weight is not None:  # an infinite slope by them times a weight of 0 would be NaN
        mute = (sample_weight == 0) & jnp.isinf(z)
        y, pos_weight = jax.tree.map(
            lambda x: jnp.where(mute, jax.lax.stop_gradient(x), x), (y, pos_weight)
        )
    loss = (_logistic if forward_mode else _fused)(False, z, y, pos_weight)
    weight = reductions.weights("weight", weight, loss.shape, loss.dtype)
    if weight is not None:
        loss = weighted(weight, silenced(sample_weight, loss))
    return reductions.reduce(loss, counts, sample_weight, reduction)


def _loss_of(
    summed: bool,
    z: Float[Array, "*shape"],
    y: Float[Array, "*shape"],
    pos_weight: Float[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"] | Float[Array, ""]:
    """`pos_weight * y * log(1 + exp(-z)) + (1 - y) * log(1 + exp(z))`, for any z, or its sum.

    Both logarithms are `log(1 + exp(-|z|))`, one of them plus `|z|`.
    """
    loss: Array
    if summed:
        loss = jax.lax.platform_dependent(
            z, y, cpu=_sum_on_cpu, default=lambda z, y: jnp.sum(_losses(z, y, None))
        )
    else:
        loss = in_one_axis(_losses, z, y, pos_weight)
    return loss


def _losses(z: Array, y: Array, pos_weight: Array | None) -> Array:
    z = z.astype(y.dtype)
    positive, negative = _coefficients(y, pos_weight)
    size = jnp.abs(z)
    of_wrong = jnp.where(z > 0, negative, positive)
    near = log1p_below_one(jnp.exp(-size))
    if pos_weight is not None:
        near = (positive + negative) * near
    # Last, or XLA would add up what precedes it in one way, and store what it is made of.
    return jnp.where((size == jnp.inf) & (of_wrong == 0), 0, size * of_wrong + near)


def _coefficients(y: Array, pos_weight: Array | None) -> tuple[Array, Array]:
    return (y if pos_weight is None else y * pos_weight), 1 - y


def _sum_on_cpu(z: Array, y: Array) -> Array:
    """The sum of the losses, none of which is stored, as none is selected.

    Infinite logits are NaN in the plain formula, and show in the sum: then it is found again.
    """
    total = jnp.sum(in_one_axis(_losses_if_finite, z, y))
    return unless(jnp.isfinite(total), total, lambda: jnp.sum(in_one_axis(_losses_to_add, z, y)))


def _losses_if_finite(z: Array, y: Array) -> Array:
    return _far(z, y) + _near(z)


def _losses_to_add(z: Array, y: Array) -> Array:
    # An infinite logit costs nothing if the coefficient of its side is 0, and infinitely much if
    # not: its finite substitute is multiplied by so much that a product overflows.
    most = float(jnp.finfo(z.dtype).max)
    finite = jnp.maximum(-jnp.maximum(-z, -most), -most)  # jnp.clip would be stored
    excess = jnp.minimum(jnp.abs(z - finite), most / 2)
    return _far(finite, y) * (1 + excess) + _near(z)


def _far(z: Array, y: Array) -> Array:
    # The greater one is that of the logit's sign, as they differ by z. A constant that the slopes
    # have too XLA would store, as an array: so 1 - y is -(y - 1).
    return -jnp.minimum(z * (y - 1), z * y)


def _near(z: Array) -> Array:
    return jnp.log1p(jnp.exp(-jnp.abs(z)))


@jax.custom_jvp
def _probabilities(z: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """The sigmoids `p` of z and `q` of -z.

    With `p = 1 / (1 + e)` and `q = e p` neither loses digits to a subtraction, and there is no
    select to keep a CPU from computing it in one pass. The exponent is bounded, as `inf * 0` would
    be NaN (and `p` has to stay a normal number); a factor of 0 removes what is left of `p` at -inf.
    """
    most = float(jnp.finfo(z.dtype).max)
    e = jnp.exp(-jnp.maximum(z, -0.98 * math.log(most)))
    p = 1 / (1 + e)
    above = jnp.minimum(jnp.maximum(z + most, 0), 1)
    return above * p, e * p


# JAX's own derivative of the quotient divides by (1 + e)**2, which overflows long before e does.
@_probabilities.defjvp
def _probabilities_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (z,), (t_z,) = primals, tangents
    p, q = _probabilities(z)
    slope = p * q * t_z
    return (p, q), (slope, -slope)


# Forward mode needs the slopes by a rule too: JAX's own derivative of |z| is wrong at 0.
_logistic = jax.custom_jvp(_loss_of, nondiff_argnums=(0,))

_Elements = tuple[ArrayLike, ArrayLike, ArrayLike | None]


def _arrays(elements: _Elements) -> tuple[Array, Array, Array | None]:
    z, y, pos_weight = elements  # scalars come as literals
    return jnp.asarray(z), jnp.asarray(y), None if pos_weight is None else jnp.asarray(pos_weight)


def _slopes(z: Array, y: Array, pos_weight: Array | None) -> tuple[Array, ...]:
    """Derivatives of `_loss_of` by each of its arguments: `p - y` by the logits, and so on.

    What a factor of 0 multiplies is 0, also at an infinite logit.
    """
    z = z.astype(y.dtype)
    p, q = _probabilities(z)
    positive, negative = _coefficients(y, pos_weight)
    dz = negative * p - positive * q
    if pos_weight is None:
        return dz, -z
    # softplus(-z) and softplus(z), whose own slopes are p and q to all digits by the same rule.
    of_positive, of_negative = (_logistic(False, x, jnp.zeros_like(x)) for x in (-z, z))
    return dz, weighted(pos_weight, of_positive) - of_negative, weighted(y, of_positive)


@functools.partial(_logistic.defjvp, symbolic_zeros=True)
def _logistic_jvp(
    summed: bool, elements: _Elements, tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    arrays = _arrays(elements)
    slopes = _slopes(*arrays)
    tangent = linear(slopes, tangents[: len(slopes)])
    return _logistic(summed, *arrays), jnp.sum(tangent) if summed else tangent


_fused = jax.custom_vjp(_loss_of, nondiff_argnums=(0,))


# Both as a whole for those who differentiate outside `jit`, where conditionals would be compiled in
# each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fused_fwd(
    summed: bool, z: Array, y: Array, pos_weight: Array | None = None
) -> tuple[Array, _Elements]:
    # Reverse over reverse differentiates this value, so it needs the rule of forward mode.
    return _logistic(summed, z, y, pos_weight), (z, y, pos_weight)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _fused_bwd(_: bool, elements: _Elements, g: Array) -> tuple[Array | None, ...]:
    arrays = _arrays(elements)

    def by_logits(z: Array, y: Array, pos_weight: Array | None, g: Array) -> Array:
        return narrowed(g * _slopes(z, y, pos_weight)[0], z.dtype)

    dz = in_long_rows(by_logits, *arrays, g)
    # An infinite slope by a label must not turn a loss that weighs nothing into NaN.
    gradients = (dz, *(weighted(g, d) for d in _slopes(*arrays)[1:]))
    return (*gradients, None) if elements[2] is None else gradients


_fused.defvjp(_fused_fwd, _fused_bwd)
