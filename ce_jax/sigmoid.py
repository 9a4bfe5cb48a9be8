"""Sigmoid (binary) cross-entropy of logits, with the fused derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import logistic, sharded
from ._rows.numerics import silenced, weighted


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
        checks.float_option("label_smoothing", label_smoothing, 0.0, 1.0),
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
    z, y, counts = targets.elements("logits", logits, labels, where, label_smoothing, sample_weight)
    if temperature is not None:  # without one, narrow logits are not cast
        z = options.tempered_elements(z.astype(y.dtype), temperature, counts)
    pos_weight = reductions.element_weights("pos_weight", pos_weight, y.shape, y.dtype)
    if pos_weight is not None:
        pos_weight = sharded.with_sharding_of(pos_weight, y)
    sample_weight = reductions.weights("sample_weight", sample_weight, y.shape, y.dtype)
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
