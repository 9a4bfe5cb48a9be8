"""The parts of a cross-entropy: label uncertainty, model error, and the gradient of each logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ._arguments import checks, options, targets
from ._arguments.compiled import compiled
from ._arguments.types import ArrayLike, Axes
from ._rows import sharded
from ._rows.bins import bin_counts, bin_sums
from ._rows.dtypes import wide
from ._rows.numerics import divergence_terms, log_softmax


class CrossEntropyParts(NamedTuple):
    """The parts of a cross-entropy by example and class; see `cross_entropy_parts`.

    Attributes:
      entropy: uncertainty of the labels, which is the loss of a perfect model.
      divergence: error of the model.
    """

    entropy: Float[Array, "*rows classes"]
    divergence: Float[Array, "*rows classes"]


def cross_entropy_parts(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> CrossEntropyParts:
    r"""Splits a cross-entropy into label uncertainty and model error, by example and class.

    For label distributions :math:`q` and :math:`p = \mathrm{softmax}(z)`:

    .. math::
      -\sum_c q_c \log p_c = \sum_c \underbrace{-q_c \log q_c}_{\text{entropy}}
        + \sum_c \underbrace{q_c \log \frac{q_c}{p_c} - q_c + p_c}_{\text{divergence}}

    The sum over the class axis gives the parts of an example; the sum over the examples gives the
    parts of a class. The terms :math:`p_c - q_c` add up to 0 over the classes. They make every part
    of the divergence at least 0, and 0 only where p and q agree.

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating; `-inf` masks a class.
      labels: a non-negative number for each class, as in `softmax_cross_entropy`.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      temperature: divides the logits. A scalar or an array with the axes of the rows (size 1
        broadcasts). At least 1e-6. May be traced.

    Returns:
      A named tuple of `entropy` and `divergence` in nats, each `[..., C]` with the class axis
      last, float32 (float64 for float64 logits). Rows that do not count are 0.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or an axis that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits, labels = jnp.zeros((1, 2)), jnp.array([[0.75, 0.25]])
      >>> parts = ce_jax.cross_entropy_parts(logits, labels)
      >>> print(parts.entropy.sum(), parts.divergence.sum())
      0.5623 0.1308

    References:
      Kullback and Leibler, `On Information and Sufficiency`, 1951.
    """
    checked = options.temperature(temperature)
    return _cross_entropy_parts(logits, labels, where, checked, axis=checks.static_axis(axis))


@compiled
def _cross_entropy_parts(
    logits: Array, labels: Array, where: Array | None, temperature: Array | None, *, axis: Axes
) -> CrossEntropyParts:
    rows = targets.rows_of("logits", logits, axis, where)
    z = targets.without_excluded(rows.values, rows.counts)
    z = options.tempered_logits(z.astype(wide(z.dtype)), temperature, rows.counts)
    log_p = log_softmax(z)
    q = targets.distributions(labels, logits.shape, axis, log_p.dtype)
    q = sharded.with_sharding_of(q, log_p)
    q = targets.without_excluded(q, rows.counts)
    likely = q > 0
    log_q = jnp.log(jnp.where(likely, q, 1))
    divergence = divergence_terms(q, log_q, log_p)
    entropy = q * (0 - log_q)  # not -0 where the label is certain
    valid = jnp.where(q >= 0, 1, jnp.nan).astype(q.dtype)
    parts = (targets.without_excluded(x * valid, rows.counts) for x in (entropy, divergence))
    return CrossEntropyParts(*parts)


class GradientView(NamedTuple):
    """The gradient of a cross-entropy with respect to the logits; see `gradient_view`.

    Attributes:
      per_example: `p - y` of each example.
      by_label: the mean of `p - y` over the examples of each label, one row per label.
      size: number of examples of each label.
    """

    per_example: Float[Array, "*rows classes"]
    by_label: Float[Array, "classes classes"]
    size: Integer[Array, " classes"]


def gradient_view(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> GradientView:
    r"""The gradient p - y of the cross-entropy: of each example, and its mean for each label.

    .. math:: g_{nc} = \mathrm{softmax}(z_n)_c - [c = y_n]

    Row i, column j of `by_label` is the mean gradient of logit j over the examples of class i. An
    entry on the diagonal is minus the probability that the model gives to wrong classes. A large
    entry off the diagonal shows a class that the model confuses with class i.

    Args:
      logits: unnormalised log-probabilities `[..., C]`, floating; `-inf` masks a class.
      labels: class ids `[...]`, of any integer dtype.
      axis: the class axis, or a tuple of class axes; labels are then flat indices into these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      ignore_index: label of rows that do not count.

    Returns:
      A named tuple of `per_example` `[..., C]`, `by_label` `[C, C]`, float32 (float64 for float64
      logits), and `size` `[C]`. Rows that do not count are 0, as are labels without examples; a
      label that is not a class makes its row NaN and is left out of the means.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or an axis that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> view = ce_jax.gradient_view(jnp.zeros((1, 4)), jnp.array([0]))
      >>> print(view.per_example.round(2))
      [[-0.75  0.25  0.25  0.25]]

    References:
      Bridle, `Training Stochastic Model Recognition Algorithms as Networks can Lead to Maximum
      Mutual Information Estimation of Parameters`, 1989.
    """
    return _gradient_view(
        logits,
        labels,
        where,
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
    )


@compiled
def _gradient_view(
    logits: Array,
    labels: Array,
    where: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
) -> GradientView:
    rows = targets.rows_of("logits", logits, axis, where)
    *shape, classes = rows.values.shape
    label = targets.class_ids(labels, shape, classes, rows.counts, ignore_index, axis)
    p = jnp.exp(log_softmax(targets.without_excluded(rows.values, label.counts)))
    gradient = p - jax.nn.one_hot(label.ids, classes, dtype=p.dtype)
    usable = checks.both(label.counts, ~label.unknown)
    kept = jnp.where(usable[..., None], gradient, 0)
    segments = sharded.whole(label.ids).reshape(-1)
    size = bin_counts(sharded.whole(usable).reshape(-1), segments, classes)
    total = bin_sums(sharded.whole(kept).reshape(-1, classes), segments, classes)
    by_label = total / jnp.maximum(size, 1).astype(p.dtype)[:, None]
    return GradientView(jnp.where(label.unknown[..., None], jnp.nan, kept), by_label, size)
