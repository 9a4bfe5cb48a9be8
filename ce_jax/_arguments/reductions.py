"""Masks, sample weights and reductions of per-example losses."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .._rows.numerics import weighted
from ..ratio import Ratio
from . import checks
from .types import ArrayLike, Axes, Loss, Reduction


def weights(
    sample_weight: ArrayLike | None, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."] | None:
    """Weights of examples, in the loss's shape and dtype."""
    if sample_weight is None:
        return None
    given = checks.real("sample_weight", sample_weight).astype(dtype)
    return checks.of_rows("sample_weight", given, shape, "the loss")


def element_weights(
    name: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."] | None:
    """Weights that may be those of the last axis alone, in the loss's shape and dtype."""
    if x is None:
        return None
    return checks.broadcast(name, checks.real(name, x).astype(dtype), shape, "the loss")


class Reducer(NamedTuple):
    """How losses are reduced: a constant of the compiled function.

    Attributes:
      kind: one of `Reduction`.
      axis: the axes of the loss to reduce; None for all.
    """

    kind: Reduction
    axis: tuple[int, ...] | None = None

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes to reduce of a loss with so many."""
        return checks.axes(self.axis, ndim, "reduction_axis", "the loss")


def reducer(reduction: Reduction, reduction_axis: Axes = None) -> Reducer:
    """Checks the arguments of these names."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    if reduction_axis is None:
        return Reducer(reduction)
    if reduction == "none":
        raise ValueError(
            f"reduction_axis={reduction_axis!r} needs a reduction, got 'none'; "
            "write reduction='sum', 'mean' or 'ratio'"
        )
    axis: Any = checks.hashable_axes("reduction_axis", reduction_axis)
    if axis == ():
        raise ValueError("reduction_axis must name at least one axis; omit it to reduce all axes")
    return Reducer(reduction, axis if isinstance(axis, tuple) else (axis,))


def masked(
    loss: Float[Array, "*rows"],
    counts: Bool[Array, "*rows"] | None,
    sample_weight: Float[Array, "*rows"] | None,
) -> Float[Array, "*rows"]:
    """The losses, weighted, and 0 where they do not count, whatever loss and weight are there."""
    if sample_weight is not None:
        if counts is not None:  # as a factor it would reach other derivatives: 0 times NaN is NaN
            sample_weight = jnp.where(counts, sample_weight, 0)
        loss = weighted(sample_weight, loss)
    return loss if counts is None else jnp.where(counts, loss, 0)


def reduce(
    loss: Float[Array, "*rows"],
    counts: Bool[Array, "*rows"] | None,
    sample_weight: Float[Array, "*rows"] | None,
    reducer: Reducer,
    label_weight: Float[Array, "*rows"] | None = None,
) -> Loss:
    """Applies mask and sample weights, then the reduction.

    The mean divides by `sum(sample_weight * label_weight)` over the examples that count. If that is
    0, the mean is 0 and so is its gradient.
    """
    loss = masked(loss, counts, sample_weight)
    return combined(loss, reducer, counts, sample_weight, label_weight)


def combined(
    loss: Float[Array, "*rows"],
    reducer: Reducer,
    counts: Bool[Array, "*rows"] | None,
    *weights: Float[Array, "*rows"] | None,
) -> Loss:
    """The reduction of losses that are masked and weighted already."""
    if reducer.kind == "none":
        return loss
    total = jnp.sum(loss, reducer.axes(loss.ndim))
    return of_total(total, reducer, loss.shape, counts, *weights)


def of_total(
    total: Float[Array, "..."],
    reducer: Reducer,
    shape: tuple[int, ...],
    counts: Bool[Array, "*rows"] | None,
    *weights: Float[Array, "*rows"] | None,
) -> Loss:
    """The reduction of losses of this shape, given their sums."""
    if reducer.kind == "sum":
        return total
    by = denominator(shape, total.dtype, counts, *weights, axes=reducer.axes(len(shape)))
    return finish(Ratio(total, by), reducer)


def finish(ratio: Ratio, reducer: Reducer) -> Loss:
    """The ratio, or the mean if that is asked for."""
    return cast(Loss, ratio) if reducer.kind == "ratio" else ratio.mean()


def denominator(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    counts: Bool[Array, "*rows"] | None,
    *weights: Float[Array, "*rows"] | None,
    axes: tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """The sum, over the examples that count, of the product of the weights."""
    total = jnp.ones(shape, dtype)
    for weight in weights:
        if weight is not None:
            total = total * (weight if counts is None else jnp.where(counts, weight, 0))
    return jnp.sum(total if counts is None else jnp.where(counts, total, 0), axes)
