"""Reads and writes a few columns of each row of a tile, by class id."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from .dtypes import wide

# The first class of a tile, or of a block.
First = int | Integer[Array, ""]


def is_label(
    labels: Integer[Array, "*rows"], z: Float[Array, "*rows classes"], first_class: First = 0
) -> Bool[Array, "*rows classes"]:
    """True in the column of each row's label, by comparison: a scatter is slow off the CPU."""
    columns = jax.lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    return columns == (labels - first_class)[..., None]


def label_logit(
    z: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"], first_class: First = 0
) -> Float[Array, "*rows"]:
    """The logit of the label, 0 where the label is not in this tile, in the accumulation dtype."""
    if _classes_spread(z):
        # JAX refuses to gather along an axis that it knows to be sharded (explicit axis types).
        logit = jnp.sum(jnp.where(is_label(labels, z, first_class), z, 0), -1)
        return logit.astype(wide(z.dtype))
    local = labels - first_class
    inside = (local >= 0) & (local < z.shape[-1])
    column = jnp.where(inside, local, 0)[..., None]
    found = jnp.take_along_axis(z, column, axis=-1, mode="promise_in_bounds")[..., 0]
    return jnp.where(inside, found, 0).astype(wide(z.dtype))


def pick(
    z: Float[Array, "*rows classes"], ids: Integer[Array, "*rows k"] | None, first_class: First
) -> tuple[Float[Array, "*rows classes"], Any]:
    """A tile without the classes of these ids, if there are any, and their logits."""
    if ids is None:
        return z, None
    at, inside = _columns(z, ids, first_class)
    if _classes_spread(z):
        of_each = jax.lax.map(lambda x: label_logit(z, x, first_class), jnp.moveaxis(ids, -1, 0))
        found = jnp.moveaxis(of_each, 0, -1)
    else:
        there = jnp.where(inside, at, 0)
        found = jnp.take_along_axis(z, there, axis=-1, mode="promise_in_bounds")
    others = _with_columns(z, at, jnp.full_like(found, -jnp.inf, dtype=z.dtype))
    found = jnp.where(inside, found, 0).astype(wide(z.dtype))
    return others, jnp.where(ids < 0, -jnp.inf, found)


def pull_picked(
    shifted: Float[Array, "*rows classes"],
    share: Float[Array, "*rows"],
    ids: Integer[Array, "*rows k"],
    g: Float[Array, "*rows k"],
    first_class: First,
    dtype: DTypeLike,
) -> Float[Array, "*rows classes"]:
    """Cotangents of a tile: `g` of the classes of these ids, and of others a part of `share`.

    Of these none is above the maximum that the tile is relative to. Those that were picked may be,
    by so much that their exponentials overflow.
    """
    exp = jnp.exp(jnp.where(shifted > 1, 0, shifted))
    at, _ = _columns(shifted, ids, first_class)
    return _with_columns((exp * share[..., None]).astype(dtype), at, g.astype(dtype))


def _columns(
    z: Float[Array, "*rows classes"], ids: Integer[Array, "*rows k"], first_class: First
) -> tuple[Integer[Array, "*rows k"], Bool[Array, "*rows k"]]:
    """Where the tile holds these classes, and whether it does; beyond the last column if not."""
    local = ids - first_class
    inside = (ids >= 0) & (local >= 0) & (local < z.shape[-1])
    return jnp.where(inside, local, z.shape[-1]), inside


def _with_columns(
    z: Float[Array, "*rows classes"],
    columns: Integer[Array, "*rows k"],
    values: Float[Array, "*rows k"],
) -> Float[Array, "*rows classes"]:
    """The tile with other values in these columns of each row."""
    if _classes_spread(z):
        # JAX refuses to scatter along an axis that it knows to be sharded (explicit axis types).
        def step(z: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            column, value = at
            return jnp.where(is_label(column, z), value[..., None], z), None

        return jax.lax.scan(step, z, (jnp.moveaxis(columns, -1, 0), jnp.moveaxis(values, -1, 0)))[0]

    def of_row(row: Array, at: Array, value: Array) -> Array:
        return row.at[at].set(value, mode="drop")

    for _ in range(z.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(z, columns, values)


def _classes_spread(z: Float[Array, "*rows classes"]) -> bool:
    spec = jax.typeof(z).sharding.spec
    return bool(spec) and spec[-1] is not None
