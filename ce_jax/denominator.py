"""The denominator of `reduction="mean"`, for sums over several batches or devices."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.types import ArrayLike
from ._rows import sharded
from ._rows.dtypes import wide


def mean_denominator(
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""The number by which `reduction="mean"` divides `reduction="sum"`.

    .. math::
      D = \sum_{i\ \mathrm{counts}} s_i\, w_{y_i}

    with sample weights :math:`s` and, for integer labels, class weights :math:`w`. The means of
    several micro-batches or devices can't be averaged, because their denominators differ. Divide
    the sum of all losses by the sum of all denominators.

    Args:
      labels: class ids. For losses with other labels: any floating array with the shape of the
        loss; only its shape is used.
      weight: weight of each class `[C]`; with integer labels only.
      sample_weight: weight of each example, a scalar or an array with the axes of `labels` (size 1
        broadcasts).
      where: bool, a scalar or an array with the axes of `labels` (size 1 broadcasts): the examples
        to include.
      ignore_index: label of rows that do not count; with integer labels only.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `weight` is sharded by
        classes. For sharded rows, add up the denominators of the devices.

    Returns:
      The denominator, `[]`, in float32 (float64 if a weight or a floating `labels` is float64).
      With `weight`, NaN if the label of a row that counts is not a class.

    Raises:
      TypeError: for a dtype or type that does not fit, or an option that needs integer labels.
      ValueError: for a shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> labels = jnp.array([0, 1, -100, 1])
      >>> weight = jnp.array([1.0, 0.25])
      >>> print(ce_jax.mean_denominator(labels, weight=weight, ignore_index=-100))
      1.5

    References:
      The rule of `torch.nn.CrossEntropyLoss`.
    """
    ignore_index = checks.integer_option("ignore_index", ignore_index)
    return _mean_denominator(
        labels, weight, sample_weight, where, ignore_index=ignore_index, axis_name=axis_name
    )


@compiled
def _mean_denominator(
    labels: Array,
    weight: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    *,
    ignore_index: int | None,
    axis_name: str | None,
) -> Array:
    labels = checks.real("labels", labels)
    counts = checks.mask(where, labels.shape, "labels")
    if weight is not None or ignore_index is not None:
        labels = checks.integer("labels", labels)
    given = (x for x in (labels, weight, sample_weight) if x is not None)
    dtype = wide(*(jnp.asarray(x).dtype for x in given))

    sample_weight = reductions.weights(sample_weight, labels.shape, dtype)
    label_weight = None
    if weight is not None:
        weight = checks.real("weight", weight).astype(dtype)
        if weight.ndim != 1:
            raise ValueError(f"weight must have shape [C], one per class, got {weight.shape}")
        classes = sharded.all_classes(weight.size, axis_name)
        ids = targets.class_ids(labels, labels.shape, classes, counts, ignore_index)
        label_weight = sharded.take_class(weight, ids.ids, axis_name)
        label_weight = targets.nan_if(ids.unknown, label_weight, sample_weight)
        counts = ids.counts
    elif ignore_index is not None:
        counts = targets.without_ignored(labels, counts, ignore_index)
    return reductions.denominator(labels.shape, dtype, counts, sample_weight, label_weight)
