"""Label smoothing of target distributions, and another convention of it.

The losses of this package spread `label_smoothing` over all classes. Other code spreads a share
over all classes except the label, and subtracts the minimum of the loss. Two functions convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.compiled import compiled
from ._arguments.options import scalar
from ._arguments.types import ArrayLike, Axes, Scalar
from ._rows.dtypes import wide
from ._rows.numerics import pushed


def smooth_labels(
    labels: ArrayLike,
    alpha: Scalar,
    *,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    r"""Mixes target distributions with the uniform one.

    .. math:: y_c = (1 - \alpha)\, q_c + \frac{\alpha}{K}

    Args:
      labels: target distributions `[..., C]`, floating.
      alpha: share of the uniform distribution, in [0, 1]. May be traced.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool, a scalar or an array with the axes of `labels` (size 1 broadcasts): the `K`
        classes of each row that take a share of `alpha`. Excluded classes get no share (optax gives
        them `alpha / K` as well).

    Returns:
      The smoothed labels, of the shape and dtype of `labels`.

    Raises:
      TypeError: for labels of a dtype that is not floating.
      ValueError: for a shape, an axis or an `alpha` that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.smooth_labels(jnp.array([0.0, 1.0, 0.0, 0.0]), 0.2))
      [0.05 0.85 0.05 0.05]

    References:
      Szegedy et al., `Rethinking the Inception Architecture for Computer Vision`, 2016;
      Mueller et al., `When Does Label Smoothing Help?`, 2019.
    """
    alpha = scalar("alpha", alpha, 0.0, 1.0)
    return _smooth_labels(labels, alpha, where, axis=checks.static_axis(axis))


@compiled
def _smooth_labels(
    labels: Array,
    alpha: Array,
    where: Array | None,
    *,
    axis: Axes,
) -> Array:
    labels = checks.floating("labels", labels)
    axes = checks.axes(axis, labels.ndim)
    included = checks.included(where, labels.shape, "labels")
    alpha = alpha.astype(wide(labels.dtype))
    count = jnp.sum(included, axes, keepdims=True, dtype=alpha.dtype)
    share = alpha / jnp.maximum(count, 1)
    smoothed = (1 - alpha) * labels.astype(alpha.dtype) + jnp.where(included, share, 0)
    return smoothed.astype(labels.dtype)


def smoothing_over_others(eps: Scalar, num_classes: int) -> Float[Array, ""]:
    r"""The `label_smoothing` that equals a share spread over all classes except the label.

    .. math:: \frac{\epsilon C}{C - 1}

    The label then keeps :math:`1 - \epsilon`, and each other class gets :math:`\epsilon / (C - 1)`:
    the targets of T5X and of Flax' examples.

    Args:
      eps: share of the other classes, in [0, 1 - 1 / C]. With 1 - 1 / C, all classes have the same
        share. May be traced.
      num_classes: C, the number of classes; if some are masked, the number of allowed classes. With
        one class the result is 0 for any `eps` in [0, 1].

    Returns:
      A scalar in [0, 1], in float32 (float64 for float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for an `eps` that is out of range or not a scalar, or a `num_classes` below 1.

    Example:
      >>> import ce_jax
      >>> print(ce_jax.smoothing_over_others(0.1, 5))
      0.125

    References:
      Szegedy et al., `Rethinking the Inception Architecture for Computer Vision`, 2016; over the
      others: Vaswani et al., `Attention Is All You Need`, 2017, in its code.
    """
    classes = checks.positive_int("num_classes", num_classes)
    most = 1 - 1 / classes if classes > 1 else 1.0
    return _over_others(scalar("eps", eps, 0.0, most), classes=classes)


@compiled
def _over_others(eps: Array, *, classes: int) -> Array:
    eps = eps.astype(wide(eps.dtype))
    # Divided by the largest share, which is rounded: so the largest share gives exactly 1.
    return eps / jnp.asarray(1 - 1 / classes, eps.dtype) if classes > 1 else 0 * eps


def smoothed_label_entropy(label_smoothing: Scalar, num_classes: int) -> Float[Array, ""]:
    r"""Entropy of a smoothed label: the minimum of the cross-entropy with this label.

    .. math::
      H = -p \log p - (C - 1)\, q \log q, \qquad
      q = \frac{\mathrm{label\_smoothing}}{C}, \quad p = 1 - (C - 1)\, q

    T5X and Flax' examples subtract it, so that a perfect prediction has loss 0. It is a constant
    for the gradient of the logits. It holds without class weights and without masked classes.

    Args:
      label_smoothing: `label_smoothing` of the losses of this package, in [0, 1]; see
        `smoothing_over_others` for the other convention. May be traced. At 0 the derivative is
        :math:`+\infty`.
      num_classes: C, the number of classes.

    Returns:
      A scalar in nats, in float32 (float64 for float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a `label_smoothing` that is out of range or not a scalar, or a `num_classes`
        below 1.

    Example:
      >>> import ce_jax
      >>> print(ce_jax.smoothed_label_entropy(ce_jax.smoothing_over_others(0.1, 5), 5).round(4))
      0.4637

    References:
      Shannon, `A Mathematical Theory of Communication`, 1948.
    """
    classes = checks.positive_int("num_classes", num_classes)
    return _entropy_of(scalar("label_smoothing", label_smoothing, 0.0, 1.0), classes=classes)


@compiled
def _entropy_of(label_smoothing: Array, *, classes: int) -> Array:
    smoothing = label_smoothing.astype(wide(label_smoothing.dtype))
    if classes == 1:
        return 0 * smoothing
    return _entropy(smoothing, jnp.asarray(classes, smoothing.dtype))


@jax.custom_jvp
def _entropy(smoothing: Array, classes: Array) -> Array:
    """With e = (C - 1) q, p + e = 1, and so H = -log p + e log(p / q)."""
    share = smoothing * ((classes - 1) / classes)
    much = share > 0.5
    p = jnp.where(much, (1 - smoothing) + smoothing / classes, 0.5)  # 1 - share would cancel
    surprise = jnp.where(much, -jnp.log(p), -jnp.log1p(-jnp.where(much, 0, share)))
    return surprise + jnp.where(share == 0, 0, share * _log_odds(smoothing, classes))


@_entropy.defjvp
def _entropy_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """By the smoothing: log(p / q) times the derivative of the share 1 - p."""
    smoothing, classes = primals
    slope = (classes - 1) / classes * _log_odds(smoothing, classes)
    return _entropy(smoothing, classes), pushed(slope, tangents[0])


def _log_odds(smoothing: Array, classes: Array) -> Array:
    """log(p / q), where p / q = 1 + C (1 - s) / s; exact at both ends of s."""
    little = smoothing < 0.5
    low, high = jnp.where(little, smoothing, 0.25), jnp.where(little, 0.75, smoothing)
    from_below = jnp.log(classes * (1 - low) + low) - jnp.log(low)
    return jnp.where(little, from_below, jnp.log1p(classes * (1 - high) / high))
