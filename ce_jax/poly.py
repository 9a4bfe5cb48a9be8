"""Poly loss with target distributions, named as in optax."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows.dense import row_statistics
from ._rows.dtypes import wide
from ._rows.numerics import one_minus_exp, relative
from ._rows.tile import Target


@reducible
def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    epsilon: Scalar = 2.0,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Cross-entropy with target distributions, plus a term linear in 1 - p.

    For logits :math:`z`, labels :math:`q` and :math:`p = \mathrm{softmax}(z)`:

    .. math:: \ell = \sum_c q_c \left( -\log p_c + \epsilon (1 - p_c) \right)

    For class ids, `poly_loss` of the label's log-probability gives the same with less work.

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating. `-inf` marks a class that is not
        allowed; if such a class has a label other than 0, the loss is +inf. (optax ignores labels
        of classes that `where` excludes; `labels * where` gives the same value.)
      labels: a non-negative number for each class, as in `softmax_cross_entropy`.
      epsilon: number added to the first coefficient of the series in 1 - p. May be traced.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`). A
        row that does not count has loss 0 and gradient 0.
      temperature: divides the logits, in the dtype of the loss. A scalar or an array with the axes
        of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each example, a scalar or an array with the axes of the loss (size 1
        broadcasts). With weight 0, loss and gradient of the row are 0, even if they would be inf or
        NaN.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"); JAX
        then differentiates by its own rules.

    Returns:
      The loss, of the shape of `logits` without the class axes or `[]`, in float32 (float64 for
      float64 logits).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits = jnp.array([[4.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.8, 0.2]])
      >>> print(ce_jax.poly_loss_cross_entropy(logits, labels, reduction="sum"))
      1.7390

    References:
      Leng et al., `PolyLoss: A Polynomial Expansion Perspective of Classification Loss
      Functions`, 2022.
    """
    return _poly_loss_cross_entropy(
        logits,
        labels,
        scalar("epsilon", epsilon),
        where,
        sample_weight,
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _poly_loss_cross_entropy(
    logits: Array,
    labels: Array,
    epsilon: Array,
    where: Array | None,
    sample_weight: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    rows = targets.rows_of("logits", logits, axis, where)
    dtype, shape = wide(rows.values.dtype), rows.values.shape[:-1]
    sample_weight = reductions.weights(sample_weight, shape, dtype)
    z = targets.without_excluded(rows.values, rows.counts, sample_weight).astype(dtype)
    probs = targets.distributions(labels, logits.shape, axis, dtype)
    probs = targets.without_excluded(probs, rows.counts, sample_weight)
    # Neither part depends on the row's maximum, and without it lse keeps the digits of log p.
    z = relative(z) if temperature is None else options.tempered_logits(z, temperature, rows.counts)
    statistics = row_statistics(z, Target(probs=probs), forward_mode=forward_mode)
    loss = statistics.cross + epsilon.astype(dtype) * _missed(z, probs, statistics.lse)
    return reductions.reduce(loss, rows.counts, sample_weight, reduction)


@jax.custom_jvp
def _missed(
    z: Float[Array, "*rows classes"],
    probs: Float[Array, "*rows classes"],
    lse: Float[Array, "*rows"],
) -> Float[Array, "*rows"]:
    """`sum_c q_c (1 - p_c)`, of logits relative to the largest of their row."""
    return jnp.sum(probs * one_minus_exp(z - lse[..., None]), -1)


@_missed.defjvp
def _missed_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """By the logits `-q_c p_c`. The sum of these, for `lse`, is found from the loss.

    `p` is not `exp(z - lse)`, or that difference would be stored for both.
    """
    (z, probs, lse), (d_z, d_probs, d_lse) = primals, tangents
    missed, p = _missed(z, probs, lse), jnp.exp(z) * jnp.exp(-lse)[..., None]
    by_class = d_probs * one_minus_exp(z - lse[..., None]) - probs * p * d_z
    return missed, jnp.sum(by_class, -1) + (jnp.sum(probs, -1) - missed) * d_lse
