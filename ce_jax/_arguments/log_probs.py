"""Losses of log-probabilities: arrays of one shape and dtype, masks, and reduction."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._rows import sharded
from .._rows.dtypes import wide
from . import checks, reductions
from .reductions import Reducer
from .types import ArrayLike, Loss


class Examples(NamedTuple):
    """Numbers of each example, of one shape and dtype, 0 where they are to have no effect.

    Attributes:
      values: the arrays, in the order in which they were given.
      counts: rows that count; None if all do.
      weights: weight of each row; None if all are 1.
    """

    values: tuple[Float[Array, "*rows"], ...]
    counts: Bool[Array, "*rows"] | None
    weights: Float[Array, "*rows"] | None


def examples_of(
    arrays: dict[str, Array],
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    *,
    broadcast: tuple[str, ...] = (),
) -> Examples:
    """Checks arrays by name: they have the shape of the first, but for those that may broadcast.

    All arrays get the widest of their dtypes, at least float32, so no array is rounded to the dtype
    of another.
    """
    found = {name: checks.floating(name, x) for name, x in arrays.items()}
    dtype = wide(*(x.dtype for x in found.values()))
    first, shape = next((name, x.shape) for name, x in found.items())
    # Before they are broadcast, as the cotangents of an array add up in its dtype.
    found = {name: x.astype(dtype) for name, x in found.items()}
    for name, x in found.items():
        if name in broadcast:
            found[name] = checks.of_rows(name, x, shape, first)
        else:
            checks.shape_is(name, x, shape, f"the shape of {first}")
    values = tuple(sharded.with_sharding_of(x, found[first]) for x in found.values())
    weights = reductions.weights(sample_weight, shape, dtype)
    counts = checks.mask(where, shape, "the loss")
    keep = counts
    if weights is not None:  # the derivative of a weight of 0 is the loss, if it is finite
        finite = functools.reduce(operator.and_, map(jnp.isfinite, values))
        keep = checks.both(counts, (weights != 0) | finite)
    if keep is not None:
        values = tuple(jnp.where(keep, x, 0) for x in values)
    return Examples(values, counts, weights)


def reduced(
    loss: Callable[..., Float[Array, "*rows"]], examples: Examples, reducer: Reducer
) -> Loss:
    """Masks, weights and reduces the loss of the values.

    Where a row of weight 0 has a loss that is not finite, that is of harmless values instead: its
    derivatives times 0 would be NaN.
    """
    values = examples.values
    if examples.weights is not None:
        mute = (examples.weights == 0) & ~jnp.isfinite(jax.lax.stop_gradient(loss(*values)))
        values = tuple(jnp.where(mute, 0, x) for x in values)
    return reductions.reduce(loss(*values), examples.counts, examples.weights, reducer)
