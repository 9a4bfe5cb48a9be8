"""The binary cross-entropy of each logit, and its derivative, `p - y` where nothing is weighted."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .. import _platform
from .numerics import directional, weighted

# Logits, labels, and the weight of the positive class.
_Elements = tuple[ArrayLike, ArrayLike, ArrayLike | None]


def loss(
    z: Float[Array, "*shape"],
    y: Float[Array, "*shape"],
    pos_weight: Float[Array, "*shape"] | None = None,
    *,
    forward_mode: bool,
) -> Float[Array, "*shape"]:
    """The loss of each logit, in the dtype of the labels.

    Its derivative is fused; with `forward_mode` it is one that JAX can also push forward.
    """
    return (_logistic if forward_mode else _fused)(z, y, pos_weight)


@jax.custom_jvp
def _logistic(z: Array, y: Array, pos_weight: Array | None) -> Float[Array, "*shape"]:
    """`v y log(1 + exp(-z)) + (1 - y) log(1 + exp(z))`, where 0 times infinity is 0.

    Both logarithms are `log(1 + exp(-|z|))`, and `|z|` more on the side where the logit is wrong.
    An infinite logit is first taken as the largest finite number of its sign: times a coefficient
    of 0 that is 0. With any other coefficient the product is then multiplied by that number again,
    which makes it infinite.
    """
    z = z.astype(y.dtype)
    size, most = jnp.abs(z), jnp.finfo(z.dtype).max
    finite = jnp.sign(z) * jnp.minimum(size, most)
    near, excess = jnp.log1p(jnp.exp(-size)), jnp.minimum(size - jnp.abs(finite), most)
    if pos_weight is None:
        far = jnp.maximum(finite - y * finite, -y * finite)
    else:
        positive, negative = pos_weight * y, 1 - y
        far = positive * jnp.maximum(-finite, 0) + negative * jnp.maximum(finite, 0)
        near = (positive + negative) * near
    return far + far * excess + near


def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log(1 + exp(x))`, whose derivatives keep their digits at both ends."""
    return _logistic(x, jnp.zeros_like(x), None)


@jax.custom_jvp
def probabilities(z: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """The sigmoids `p` of z and `q` of -z, as `p = 1 / (1 + e)` and `q = e p`.

    So neither loses digits to a subtraction. The exponent is bounded, as `inf * 0` would be NaN and
    `p` has to stay a normal number; what is left of `p` at -inf is removed.
    """
    most = float(jnp.finfo(z.dtype).max)
    e = jnp.exp(-jnp.maximum(z, -0.98 * math.log(most)))
    p = 1 / (1 + e)
    return jnp.where(z == -jnp.inf, 0, p), e * p


# JAX's own derivative of the quotient divides by (1 + e)**2, which overflows long before e does.
@probabilities.defjvp
def _probabilities_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (z,), (t_z,) = primals, tangents
    p, q = probabilities(z)
    slope = p * q * t_z
    return (p, q), (slope, -slope)


def _slopes(z: Array, y: Array, pos_weight: Array | None) -> tuple[Array, ...]:
    """Derivatives of the loss by each argument: `p - y` by the logits, where nothing is weighted.

    Written as `(1 - y) p - y (1 - p)` it keeps its digits where `p` and `y` are close.
    """
    z = z.astype(y.dtype)
    p, q = probabilities(z)
    positive = y if pos_weight is None else pos_weight * y
    dz = (1 - y) * p - positive * q
    if pos_weight is None:
        return dz, -z
    of_positive, of_negative = softplus(-z), softplus(z)
    return dz, weighted(pos_weight, of_positive) - of_negative, weighted(y, of_positive)


@functools.partial(_logistic.defjvp, symbolic_zeros=True)
def _logistic_jvp(elements: _Elements, tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    arrays = jax.tree.map(jnp.asarray, elements)  # scalars come as literals
    slopes = _slopes(*arrays)
    return _logistic(*arrays), directional(slopes, tangents[: len(slopes)])


@jax.custom_vjp
def _fused(z: Array, y: Array, pos_weight: Array | None) -> Float[Array, "*shape"]:
    return _platform.elementwise(_logistic, z, y, pos_weight)


def _fused_fwd(z: Array, y: Array, pos_weight: Array | None) -> tuple[Array, _Elements]:
    return _platform.elementwise(_logistic, z, y, pos_weight), (z, y, pos_weight)


# One program: outside `jit`, JAX would run the steps of the derivative one by one.
@functools.partial(jax.jit, inline=True)
def _fused_bwd(elements: _Elements, g: Array) -> tuple[Array | None, ...]:
    z, y, pos_weight = jax.tree.map(jnp.asarray, elements)
    dz, *others = _platform.elementwise(_slopes, z, y, pos_weight)
    # An infinite derivative with respect to a label, times a weight of 0, would be NaN.
    gradients = ((g * dz).astype(z.dtype), *(weighted(g, d) for d in others))
    return (*gradients, None) if pos_weight is None else gradients


_fused.defvjp(_fused_fwd, _fused_bwd)
