"""Sigmoid (binary) cross-entropy and focal loss of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled, recomputed
from ._arguments.options import option
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import logistic, sharded
from ._rows.numerics import pushed, silenced, weighted


@reducible
def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    label_smoothing: Scalar = 0.0,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Cross-entropy between sigmoid(logits) and binary labels, element by element, in nats.

    For logits :math:`z`, labels :math:`q` smoothed to
    :math:`y = (1 - \epsilon) q + \epsilon / 2`, weights :math:`w` and positive weights :math:`v`:

    .. math::
      \ell = w \left( v\, y \log(1 + e^{-z}) + (1 - y) \log(1 + e^{z}) \right)

    With no option set the gradient is :math:`\sigma(z) - y`. An infinite logit gives 0 or +inf,
    depending on the label, never NaN.

    Args:
      logits: log-odds of the positive class, floating, of any shape.
      labels: numbers in [0, 1], of any real dtype; broadcastable to `logits`.
      weight: weight of each element, broadcastable to the loss (`[C]`: one for each class).
      pos_weight: weight of the positive part, broadcastable to the loss.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each element, a scalar or an array with the axes of the loss (size 1
        broadcasts); unlike `weight` it also counts in the denominator of the mean. With weight 0
        the loss is 0, even if it would be inf or NaN.
      where: bool, a scalar or an array with the axes of the loss (size 1 broadcasts): elements to
        include. Loss and gradient of the others are 0.
      label_smoothing: share of the label that is spread evenly over both classes, in [0, 1]. May
        be traced.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the elements that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules.

    Returns:
      The loss, of the shape of `logits` or `[]`, in float32 (float64 for float64 logits).

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
    return _loss(
        logits,
        labels,
        weight,
        pos_weight,
        sample_weight,
        where,
        options.not_zero("label_smoothing", label_smoothing, 1.0),
        options.temperature(temperature),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _loss(
    logits: Array,
    labels: Array,
    weight: Array | None,
    pos_weight: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    label_smoothing: Array | None,
    temperature: Array | None,
    *,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    z, y, counts, sample_weight = targets.elements(
        "logits", logits, labels, where, label_smoothing, sample_weight
    )
    if temperature is not None:  # without one, narrow logits are not cast
        z = options.tempered_elements(z.astype(y.dtype), temperature, counts)
    pos_weight = reductions.element_weights("pos_weight", pos_weight, y.shape, y.dtype)
    if pos_weight is not None:
        pos_weight = sharded.with_sharding_of(pos_weight, y)
    if sample_weight is not None:  # an infinite derivative times a weight of 0 would be NaN
        mute = (sample_weight == 0) & jnp.isinf(z)
        y, pos_weight = jax.tree.map(
            lambda x: jnp.where(mute, jax.lax.stop_gradient(x), x), (y, pos_weight)
        )
    loss = logistic.loss(z, y, pos_weight, forward_mode=forward_mode)
    weight = reductions.element_weights("weight", weight, loss.shape, loss.dtype)
    if weight is not None:
        loss = weighted(weight, silenced(sample_weight, loss))
    return reductions.reduce(loss, counts, sample_weight, reduction)


@reducible
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    *,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
) -> Loss:
    r"""Binary cross-entropy that counts less for elements which the model already predicts well.

    For logits :math:`z`, labels :math:`y`, :math:`p = \sigma(z)`, and the probability of the label
    :math:`p_t = y p + (1 - y) (1 - p)`:

    .. math::
      \ell = \left( \alpha y + (1 - \alpha) (1 - y) \right) (1 - p_t)^\gamma
        \left( -y \log p - (1 - y) \log(1 - p) \right)

    Value and derivatives are right at any logit, also at infinite ones. JAX differentiates the loss
    by its own rules, in any mode and order, so there is no `forward_mode`.

    Args:
      logits: log-odds of the positive class, floating, of any shape.
      labels: numbers in [0, 1], of any real dtype; broadcastable to `logits`.
      alpha: weight of the positive class, in [0, 1]; the negative class has the weight `1 - alpha`.
        Broadcastable to the loss (`[C]`: one for each class). None: both weights are 1. May be
        traced.
      gamma: exponent, at least 0, broadcastable to the loss. May be traced.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each element, a scalar or an array with the axes of the loss (size 1
        broadcasts). With weight 0 the loss is 0, even if it would be inf or NaN.
      where: bool, a scalar or an array with the axes of the loss (size 1 broadcasts): elements to
        include. Loss and gradient of the others are 0.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the elements that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.

    Returns:
      The loss, of the shape of `logits` or `[]`, in float32 (float64 for float64 logits).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits, labels = jnp.array([0.0, 2.0, -jnp.inf]), jnp.array([1, 0, 0])
      >>> print(ce_jax.sigmoid_focal_loss(logits, labels, alpha=0.25).round(4))
      [0.0433 1.2376 0.    ]

    References:
      Lin et al., `Focal Loss for Dense Object Detection`, 2017.
    """
    return _sigmoid_focal_loss(
        logits,
        labels,
        None if alpha is None else option("alpha", alpha, 0.0, 1.0),
        option("gamma", gamma, low=0.0),
        sample_weight,
        where,
        options.temperature(temperature),
        reduction=reductions.reducer(reduction, reduction_axis),
    )


@compiled
@recomputed
def _sigmoid_focal_loss(
    logits: Array,
    labels: Array,
    alpha: Array | None,
    gamma: Array,
    sample_weight: Array | None,
    where: Array | None,
    temperature: Array | None,
    *,
    reduction: Reducer,
) -> Loss:
    z, y, counts, sample_weight = targets.elements(
        "logits", logits, labels, where, None, sample_weight
    )
    z = options.tempered_elements(z.astype(y.dtype), temperature, counts)
    gamma = checks.broadcast("gamma", gamma.astype(y.dtype), y.shape, "the shape of the loss")
    gamma = sharded.with_sharding_of(gamma, y)

    infinite = jnp.isinf(z)
    finite = jnp.where(infinite, 0, z)
    log_miss, cross = _log_miss_and_cross(finite, y)
    loss = jnp.exp(gamma * log_miss) * cross
    # At an infinite logit, the share of the label on the wrong side has an infinite loss, and the
    # rest has loss 0.
    denied = jnp.where(z > 0, 1 - y, y)
    size = jnp.where(denied == 0, 0, jnp.where(z > 0, z, -z))
    if sample_weight is not None:  # an infinite derivative times a weight of 0 would be NaN
        size = jnp.where(infinite & (sample_weight == 0), 0, size)
    loss = jnp.where(infinite, pushed(size, denied ** (1 + gamma)), loss)

    share = reductions.element_weights("alpha", alpha, y.shape, y.dtype)
    if share is not None:
        loss = weighted(share * y + (1 - share) * (1 - y), silenced(sample_weight, loss))
    return reductions.reduce(loss, counts, sample_weight, reduction)


def _log_miss_and_cross(
    z: Float[Array, "*shape"], y: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`log(y (1 - p) + (1 - y) p)` and the cross-entropy of finite logits, differentiable by both.

    With `u = exp(-|z|)`, and `a` and `b` the shares of the label that the logit denies and favours,
    the first is `log((a + b u) / (1 + u))` and the second `log(1 + u) + a |z|`. Where `a` is 0, `u`
    is taken out of the logarithm, as it may underflow.
    """
    up = z > 0
    away = jnp.where(up, -z, z)
    a, b = jnp.where(up, 1 - y, y), jnp.where(up, y, 1 - y)
    u = jnp.exp(away)
    normaliser = jnp.log1p(u)
    hard = a == 0
    soft = jnp.log(jnp.where(hard, 1, a) + b * u)
    # `a` is 0 here, but its derivative is not 0. Beyond 80 the derivative overflows float32; it is
    # bounded.
    back = jnp.exp(-jnp.where(hard & (away > -80), away, -80))
    sure = away + jnp.log(jnp.where(hard, b + a * back, 1))
    return jnp.where(hard, sure, soft) - normaliser, normaliser - a * away
