"""Logits of the label and of sampled classes: checks and masks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._rows import sharded
from .._rows.dtypes import wide
from . import checks, reductions
from .types import ArrayLike


class Compared(NamedTuple):
    """Logits in the dtype of the loss, with harmless values where they do not count.

    Attributes:
      label: of the label.
      negatives: of the negatives.
      counts: which rows count; None if nothing excludes any.
      included: which negatives do; None if nothing excludes any.
      weights: sample weights; None if there are none.
    """

    label: Float[Array, "*rows"]
    negatives: Float[Array, "*rows samples"]
    counts: Bool[Array, "*rows"] | None
    included: Bool[Array, "*rows samples"] | None
    weights: Float[Array, "*rows"] | None


def compared(
    label_logits: ArrayLike,
    negative_logits: ArrayLike,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
) -> Compared:
    """Checks the logits and what to include: the number of dimensions of `where` decides."""
    label = checks.floating("label_logits", label_logits)
    negatives = checks.floating("negative_logits", negative_logits)
    if negatives.ndim != label.ndim + 1 or negatives.shape[:-1] != label.shape:
        raise ValueError(
            f"negative_logits must have the shape of label_logits, {label.shape}, and one axis "
            f"more, of the negatives; got {negatives.shape}"
        )
    dtype = wide(label.dtype, negatives.dtype)
    label = label.astype(dtype)
    negatives = sharded.rows_like(negatives.astype(dtype), label[..., None])
    counts = included = None
    if where is not None:
        where = checks.boolean("where", where)
        if where.ndim == negatives.ndim:
            included = checks.of_rows("where", where, negatives.shape, "negative_logits")
            negatives = jnp.where(included, negatives, 0)
        else:
            shape = negatives.shape
            counts = checks.rows_to_include(where, label.shape, "negative_logits", shape)
    weights = reductions.weights(sample_weight, label.shape, dtype)
    kept = counts
    if weights is not None:
        # A row of weight 0 whose loss is NaN is left out. Others stay: the derivative by the weight
        # is the loss. If label and negative both have -inf, their difference is NaN.
        meets = (label == -jnp.inf) & jnp.any(negatives == -jnp.inf, -1)
        heard = (weights != 0) | (label < jnp.inf) & jnp.all(negatives < jnp.inf, -1) & ~meets
        kept = checks.both(counts, heard)
    if kept is not None:
        label = jnp.where(kept, label, 0)
        negatives = jnp.where(kept[..., None], negatives, 0)
    return Compared(label, negatives, counts, included, weights)
