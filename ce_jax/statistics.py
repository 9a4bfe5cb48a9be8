"""Statistics of each row of logits, for losses and metrics of any kind."""

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
from ._rows.dtypes import wide
from ._rows.tempered import row_statistics
from ._rows.tile import RowStatistics, Target


class SoftmaxStatistics(NamedTuple):
    """Statistics of each row of logits; see `softmax_statistics`.

    Attributes:
      lse: log-normaliser, in nats; so are the next three.
      label_logit: the logit of the label; None without labels.
      log_prob: the log-probability of the label; None without labels.
      entropy: the entropy of the softmax.
      argmax: the class with the largest logit; the first one if several are equal.
    """

    lse: Float[Array, "*rows"]
    label_logit: Float[Array, "*rows"]
    log_prob: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]
    argmax: Integer[Array, "*rows"]


def softmax_statistics(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: str | None = None,
    forward_mode: bool = False,
) -> SoftmaxStatistics:
    r"""Log-normaliser, label log-probability, entropy and argmax of each row of logits.

    .. math::
      \mathrm{lse} = \log \sum_c e^{z_c}, \quad \mathrm{label\_logit} = z_y, \quad
      \mathrm{log\_prob} = z_y - \mathrm{lse}, \quad
      \mathrm{entropy} = \mathrm{lse} - \sum_c \mathrm{softmax}(z)_c\, z_c

    All statistics but `argmax` are differentiable, so any loss computed from them has a true
    gradient: for example a policy-gradient loss from `log_prob` and `entropy`, or a focal loss from
    `log_prob`.

    Args:
      logits: `[..., C]`, floating; `-inf` marks a class that is not allowed.
      labels: class ids `[...]`, of any integer dtype. Without labels, `label_logit` and `log_prob`
        are None.
      axis: the class axis, or a tuple of class axes; labels and `argmax` are then flat indices into
        these axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      ignore_index: label of rows that do not count.
      temperature: divides the logits, in the dtype of the result. A scalar or an array with the
        axes of `labels` (size 1 broadcasts). At least 1e-6. May be traced.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the class axis is sharded;
        labels and `argmax` are ids among all classes.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      A named tuple of arrays of shape `[...]` in nats, float32 (float64 for float64 logits), and
      `argmax`, int32. All statistics of a row that does not count are 0. `label_logit` and
      `log_prob` are NaN for a label that is not a class.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> stats = ce_jax.softmax_statistics(jnp.zeros((1, 4)), jnp.array([2]))
      >>> print(stats.log_prob, stats.entropy, stats.argmax)
      [-1.3863] [1.3863] [0]

    References:
      Shannon, `A Mathematical Theory of Communication`, 1948.
    """
    return _statistics(
        logits,
        labels,
        where,
        options.temperature(temperature),
        axis=checks.static_axis(axis),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        axis_name=axis_name,
        forward_mode=forward_mode,
    )


@compiled
def _statistics(
    logits: Array,
    labels: Array | None,
    where: Array | None,
    temperature: Array | None,
    *,
    axis: Axes,
    ignore_index: int | None,
    axis_name: str | None,
    forward_mode: bool,
) -> SoftmaxStatistics:
    rows = targets.rows_of("logits", logits, axis, where, axis_name)
    z = rows.values
    classes = sharded.all_classes(z.shape[-1], axis_name)
    label = targets.maybe_class_ids(labels, z.shape[:-1], classes, rows.counts, ignore_index, axis)
    temperature = options.row_temperature(temperature, z.shape[:-1], wide(z.dtype))
    found = row_statistics(
        z,
        Target(labels=label.ids),
        label.counts,
        temperature,
        statistics=True,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    return by_label(found, label)


def by_label(found: RowStatistics, label: targets.ClassIds) -> SoftmaxStatistics:
    """Statistics as users see them: 0 in rows that do not count, NaN for labels that are none."""
    label_logit = log_prob = None
    if label.ids is not None:
        label_logit = targets.nan_if(label.unknown, found.label_logit)
        log_prob = targets.nan_if(label.unknown, -found.cross)
    out = SoftmaxStatistics(found.lse, label_logit, log_prob, found.entropy, found.argmax)
    counts = label.counts
    return out if counts is None else jax.tree.map(lambda x: jnp.where(counts, x, 0), out)
