"""The two sides of a batch of pairs: checks, masks, gathering; reduction of its losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._rows import sharded
from .._rows.dtypes import wide
from .._rows.pairs import Sides
from . import checks, reductions, targets
from .reductions import Reducer
from .types import ArrayLike, Loss


def sides(
    row_name: str,
    rows: ArrayLike,
    column_name: str,
    columns: ArrayLike,
    where: ArrayLike | None,
    logit_scale: Array,
    axis_name: str | None,
    *,
    more: bool = False,
) -> Sides:
    """Checks both sides. Where one does not exist it is 0.

    Row `i` belongs to column `i` of the same device; with `more` there may be further columns.
    """
    rows, columns = embeddings(row_name, rows), embeddings(column_name, columns)
    (n, width), m = rows.shape, columns.shape[0]
    if columns.dtype != rows.dtype:
        raise TypeError(
            f"{column_name} must have the dtype of {row_name}, {rows.dtype}, got {columns.dtype}; "
            "cast one of them"
        )
    if columns.shape[1] != width or (m < n if more else m != n):
        least = "at least " if more else ""
        raise ValueError(
            f"{column_name} must have shape [{least}{n}, {width}], as {row_name} has "
            f"{rows.shape}, got {columns.shape}"
        )
    sharded.check_sharded(row_name, rows, axis_name)
    sharded.check_sharded(column_name, columns, axis_name)
    row_counts, column_counts = checks.mask(where, (n,), f"the rows of {row_name}"), None
    if row_counts is not None:
        row_counts = sharded.like(row_counts, rows)
        further = sharded.like(jnp.ones(m - n, bool), row_counts)
        column_counts = jnp.concatenate([row_counts, further])
        rows = targets.without_excluded(rows, row_counts)
        columns = targets.without_excluded(columns, column_counts)
        column_counts = gathered(column_counts, axis_name)
    return Sides(
        rows=rows,
        columns=gathered(columns, axis_name),
        scale=logit_scale.astype(wide(rows.dtype)),
        first=jnp.asarray(sharded.first_class(m, axis_name), jnp.int32),
        row_counts=row_counts,
        column_counts=column_counts,
    )


def embeddings(name: str, x: ArrayLike) -> Float[Array, "n width"]:
    """`x`, if it is a row of numbers for each example."""
    x = checks.floating(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [N, D], got {x.shape}")
    checks.not_spread(name, x, "call the function inside jax.shard_map, with axis_name=")
    return x


def without_silent_rows(x: Sides, sample_weight: ArrayLike | None) -> Sides:
    """The sides, with 0 in rows of weight 0 that hold a NaN or infinity.

    For losses in which no row affects the loss of another row.
    """
    n, dtype = x.rows.shape[0], x.scale.dtype
    weights = reductions.weights(sample_weight, (n,), dtype)
    return x._replace(rows=targets.without_silent(x.rows, weights))


def gathered(x: Array, axis_name: str | None) -> Array:
    """The rows of all devices. In the derivative, each device gets the sum for its own rows."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def reduced(
    loss: Float[Array, " n"],
    counts: Bool[Array, " n"] | None,
    sample_weight: ArrayLike | None,
    axis_name: str | None,
    reducer: Reducer,
) -> Loss:
    """Masks, weights and reduces this device's losses; all but "none" is over all devices."""
    weights = reductions.weights(sample_weight, loss.shape, loss.dtype)
    if axis_name is None or reducer.kind == "none":
        return reductions.reduce(loss, counts, weights, reducer)
    parts: Any = reductions.reduce(loss, counts, weights, reducer._replace(kind="ratio"))
    ratio = sharded.psum(sharded.like(parts, loss), axis_name)
    return ratio.total if reducer.kind == "sum" else reductions.finish(ratio, reducer)
