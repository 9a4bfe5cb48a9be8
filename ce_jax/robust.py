r"""Losses that are functions of the log-probability of the label.

Each function takes `log_prob`, for example from `softmax_statistics(logits, labels)`, and returns
the loss of the same shape. Weights and means are up to the caller. A row that does not count has
`log_prob` 0, and its loss is 0 in each function. JAX differentiates these losses by its own rules,
in any mode and order.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.compiled import compiled
from ._arguments.options import log_probability, scalar
from ._arguments.types import ArrayLike, Scalar
from ._rows import sharded
from ._rows.numerics import expm1_ratio, one_minus_exp, power, weighted

# Below this, 1 - p rounds to 1 in float64, and so do the factors made of it.
_FAR = -100.0


def focal_loss(log_prob: ArrayLike, *, gamma: Scalar = 2.0) -> Float[Array, "..."]:
    r"""Cross-entropy that counts less for examples which the model already predicts well.

    .. math:: \ell = -(1 - p)^\gamma \log p

    With :math:`\gamma = 0` it is the cross-entropy. Derivatives at p = 1 are the limits; the first
    derivative is 0 for every :math:`\gamma > 0`. For :math:`\gamma` between 0 and 1, the second
    derivative at p = 1 is infinite and is replaced by 0, so that the Hessian with respect to the
    logits has its limit, which is 0.

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      gamma: exponent, at least 0. May be traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64). A `log_prob` between 0
      and 1e-3, which rounding can produce, counts as 0; a larger one gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a `gamma` that is negative or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.focal_loss(jnp.log(jnp.array([0.9, 0.5, 0.1])), gamma=2.0))
      [0.0011 0.1733 1.8651]

    References:
      Lin et al., `Focal Loss for Dense Object Detection`, 2017.
    """
    return _focal_loss(log_prob, scalar("gamma", gamma, low=0.0))


@compiled
def _focal_loss(log_prob: Array, gamma: Array) -> Array:
    x = log_probability("log_prob", log_prob)
    gamma = gamma.astype(x.dtype)
    near, far = x > -0.5, x < _FAR
    # 1 - p = -x (1 - e^x) / -x: the power of -x carries the derivatives at 0, the rest is smooth.
    small = jnp.where(near, x, 0)
    close = power(-small, 1 + gamma) * expm1_ratio(small) ** gamma
    large = jnp.where(near | far, -1, x)
    apart = -large * jnp.exp(gamma * jnp.log1p(-jnp.exp(large)))
    return jnp.where(near, close, jnp.where(far, -x, apart))


def poly_loss(log_prob: ArrayLike, *, epsilon: Scalar = 2.0) -> Float[Array, "..."]:
    r"""Cross-entropy in which the first term of the series in 1 - p has another coefficient.

    .. math:: \ell = -\log p + \epsilon (1 - p)

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      epsilon: number added to the first coefficient, which is 1; -1 removes the term. May be
        traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64). A `log_prob` between 0
      and 1e-3, which rounding can produce, counts as 0; a larger one gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for an `epsilon` that is not finite or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.poly_loss(jnp.log(jnp.array([0.9, 0.5, 0.2])), epsilon=2.0))
      [0.3054 1.6931 3.2094]

    References:
      Leng et al., `PolyLoss: A Polynomial Expansion Perspective of Classification Loss
      Functions`, 2022.
    """
    return _poly_loss(log_prob, scalar("epsilon", epsilon))


@compiled
def _poly_loss(log_prob: Array, epsilon: Array) -> Array:
    x = log_probability("log_prob", log_prob)
    return -x + epsilon.astype(x.dtype) * one_minus_exp(x)


def generalized_cross_entropy(log_prob: ArrayLike, *, q: Scalar = 0.7) -> Float[Array, "..."]:
    r"""A bounded loss between cross-entropy (q = 0) and mean absolute error (q = 1).

    .. math:: \ell = \frac{1 - p^q}{q}, \qquad \frac{d \ell}{d \log p} = -p^q

    A label to which the model gives probability 0, for example a wrong label, costs :math:`1 / q`
    and has gradient 0. The function is accurate for any small q, and gives :math:`-\log p` for q =
    0.

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      q: order, in [0, 1]. May be traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64). A `log_prob` between 0
      and 1e-3, which rounding can produce, counts as 0; a larger one gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a `q` that is not in [0, 1] or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.generalized_cross_entropy(jnp.array([0.0, -1.0, -jnp.inf]), q=0.5))
      [0.     0.7869 2.    ]

    References:
      Zhang and Sabuncu, `Generalized Cross Entropy Loss for Training Deep Neural Networks with
      Noisy Labels`, 2018.
    """
    return _generalized_cross_entropy(log_prob, scalar("q", q, 0.0, 1.0))


@compiled
def _generalized_cross_entropy(log_prob: Array, q: Array) -> Array:
    x = log_probability("log_prob", log_prob)
    q = sharded.with_sharding_of(jnp.broadcast_to(q.astype(x.dtype), x.shape), x)
    impossible = x == -jnp.inf
    finite = jnp.where(impossible, -1, x)
    near = q * finite > -0.5
    small = jnp.where(near, q * finite, 0)
    order = jnp.where(near & ~((q > 0) & impossible), 1, q)
    loss = jnp.where(near, -finite * expm1_ratio(small), (1 - jnp.exp(order * finite)) / order)
    return jnp.where(impossible, jnp.where(q == 0, -x, 1 / order), loss)


def symmetric_cross_entropy(
    log_prob: ArrayLike,
    *,
    alpha: Scalar = 0.1,
    beta: Scalar = 1.0,
    log_zero: Scalar = -4.0,
) -> Float[Array, "..."]:
    r"""Cross-entropy of label and prediction, plus the cross-entropy of prediction and label.

    .. math:: \ell = -\alpha \log p - \beta A (1 - p)

    The second part, :math:`-\sum_c p_c \log y_c` with a one-hot :math:`y` whose :math:`\log 0` is
    taken as :math:`A`, is bounded and so robust to wrong labels. The first part makes training
    converge faster.

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      alpha: coefficient of the cross-entropy, at least 0. May be traced.
      beta: coefficient of the reverse cross-entropy, at least 0. May be traced.
      log_zero: A, used for the logarithm of 0; at most 0. May be traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64). A `log_prob` between 0
      and 1e-3, which rounding can produce, counts as 0; a larger one gives NaN.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for an option that is out of range or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.symmetric_cross_entropy(jnp.log(jnp.array([0.9, 0.5, 0.1]))).round(4))
      [0.4105 2.0693 3.8303]

    References:
      Wang et al., `Symmetric Cross Entropy for Robust Learning with Noisy Labels`, 2019; the
      defaults are those of the paper for CIFAR-10.
    """
    return _symmetric_cross_entropy(
        log_prob,
        scalar("alpha", alpha, low=0.0),
        scalar("beta", beta, low=0.0),
        scalar("log_zero", log_zero, high=0.0),
    )


@compiled
def _symmetric_cross_entropy(log_prob: Array, alpha: Array, beta: Array, log_zero: Array) -> Array:
    x = log_probability("log_prob", log_prob)
    alpha, reverse = alpha.astype(x.dtype), beta.astype(x.dtype) * log_zero.astype(x.dtype)
    return weighted(alpha, -x) - reverse * one_minus_exp(x)


def soft_bootstrapped_cross_entropy(
    log_prob: ArrayLike,
    entropy: ArrayLike,
    *,
    beta: Scalar = 0.95,
) -> Float[Array, "..."]:
    r"""Cross-entropy with a target that mixes the label and the model's own distribution.

    With the target :math:`\beta y + (1 - \beta) p`, a confident model can overrule a wrong label:

    .. math:: \ell = -\beta \log p_y + (1 - \beta) H(p)

    The gradient is that of this formula: p in the target is not held constant.

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      entropy: entropy of the model's distribution, in nats, of the same shape.
      beta: trust in the label, in [0, 1]. May be traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for shapes that differ, or a `beta` that is not in [0, 1] or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> stats = ce_jax.softmax_statistics(jnp.log(jnp.array([[0.7, 0.2, 0.1]])), jnp.array([1]))
      >>> print(ce_jax.soft_bootstrapped_cross_entropy(stats.log_prob, stats.entropy))
      [1.5691]

    References:
      Reed et al., `Training Deep Neural Networks on Noisy Labels with Bootstrapping`, 2014.
    """
    return _soft_bootstrapped(log_prob, entropy, scalar("beta", beta, 0.0, 1.0))


def hard_bootstrapped_cross_entropy(
    log_prob: ArrayLike,
    argmax_log_prob: ArrayLike,
    *,
    beta: Scalar = 0.8,
) -> Float[Array, "..."]:
    r"""Cross-entropy with a target that mixes the label and the class that the model predicts.

    .. math:: \ell = -\beta \log p_y - (1 - \beta) \log \max_c p_c

    Args:
      log_prob: log-probability of the label, in nats, at most 0, of any shape.
      argmax_log_prob: log-probability of the predicted class, of the same shape. It is the
        `log_prob` of the statistics with their `argmax` as labels.
      beta: trust in the label, in [0, 1]. May be traced.

    Returns:
      The loss, of the shape of `log_prob`, in float32 (float64 for float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for shapes that differ, or a `beta` that is not in [0, 1] or not a scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
      >>> stats = ce_jax.softmax_statistics(logits, jnp.array([1]))
      >>> best = ce_jax.softmax_statistics(logits, stats.argmax)
      >>> print(ce_jax.hard_bootstrapped_cross_entropy(stats.log_prob, best.log_prob))
      [1.3589]

    References:
      Reed et al., `Training Deep Neural Networks on Noisy Labels with Bootstrapping`, 2014.
    """
    return _hard_bootstrapped(log_prob, argmax_log_prob, scalar("beta", beta, 0.0, 1.0))


@compiled
def _soft_bootstrapped(log_prob: Array, entropy: Array, beta: Array) -> Array:
    return _bootstrapped(log_prob, "entropy", checks.floating("entropy", entropy), beta)


@compiled
def _hard_bootstrapped(log_prob: Array, argmax_log_prob: Array, beta: Array) -> Array:
    own_loss = -log_probability("argmax_log_prob", argmax_log_prob)
    return _bootstrapped(log_prob, "argmax_log_prob", own_loss, beta)


def _bootstrapped(log_prob: Array, name: str, own_loss: Array, beta: Array) -> Array:
    x = log_probability("log_prob", log_prob)
    checks.shape_is(name, own_loss, x.shape, "the shape of log_prob")
    beta = beta.astype(x.dtype)
    return weighted(beta, -x) + weighted(1 - beta, own_loss.astype(x.dtype))
