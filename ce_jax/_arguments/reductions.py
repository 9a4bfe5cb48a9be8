"""From per-example losses to the result: masks, sample weights, and the three reductions."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .._rows.loss import weighted
from . import checks
from .types import ArrayLike, Reduction


def weights(
    name: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."] | None:
    """Weights of examples, in the loss's shape and dtype."""
    if x is None:
        return None
    return checks.of_rows(name, checks.real(name, x).astype(dtype), shape, "the loss")


def element_weights(
    name: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."] | None:
    """Weights that may be those of the last axis alone, in the loss's shape and dtype."""
    if x is None:
        return None
    return checks.broadcast(name, checks.real(name, x).astype(dtype), shape, "the loss")


def denominator(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    counts: Bool[Array, "*rows"] | None,
    *weights: Float[Array, "*rows"] | None,
) -> Float[Array, ""]:
    """The sum, over the examples that count, of the product of the weights."""
    total = jnp.ones(shape, dtype)
    for weight in weights:
        total = total if weight is None else total * weight
    return jnp.sum(total if counts is None else jnp.where(counts, total, 0))


def reduce(
    loss: Float[Array, "*rows"],
    counts: Bool[Array, "*rows"] | None,
    sample_weight: Float[Array, "*rows"] | None,
    reduction: Reduction,
    label_weight: Float[Array, "*rows"] | None = None,
) -> Float[Array, "..."]:
    """Applies mask and sample weights, then the reduction.

    The mean divides by `sum(sample_weight * label_weight)` over the examples that count. If that is
    0, the mean is 0 and so is its gradient.
    """
    if sample_weight is not None:
        loss = weighted(sample_weight, loss)
    if counts is not None:
        loss = jnp.where(counts, loss, 0)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    if reduction == "sum":
        return total
    return mean(total, loss.shape, counts, sample_weight, label_weight)


def mean(
    total: Float[Array, ""],
    shape: tuple[int, ...],
    counts: Bool[Array, "*rows"] | None = None,
    *weights: Float[Array, "*rows"] | None,
) -> Float[Array, ""]:
    """The mean of losses of this shape, given their sum."""
    size = math.prod(shape)
    all_alike = counts is None and all(weight is None for weight in weights)
    if all_alike and isinstance(size, int):  # may be symbolic
        return total / max(size, 1)
    return divide(total, denominator(shape, total.dtype, counts, *weights))


def divide(total: Float[Array, ""], by: Float[Array, ""]) -> Float[Array, ""]:
    """`total / by`, and 0 with gradient 0 where `by` is 0, unless `total` is NaN.

    As it is where a label is no class, which nothing must hide.
    """
    empty = (by == 0) & ~jnp.isnan(total)
    return jnp.where(empty, 0, total / jnp.where(by == 0, 1, by))
