"""A teacher of which a few classes per row are known, with their log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._rows import sharded
from .._rows.dtypes import wide
from . import checks
from .types import ArrayLike


class Entries(NamedTuple):
    """The known classes, and the rows that have any.

    Attributes:
      ids: class ids in range; -1 where there is none.
      log_probs: the teacher's, in the loss's dtype; -inf where there is no class.
      rounding: what their probabilities may lack of 1, as the dtype they came in has few digits.
      counts: which rows count.
      unknown: rows that count and have an id that is not a class, or an id twice.
    """

    ids: Integer[Array, "*rows k"]
    log_probs: Float[Array, "*rows k"]
    rounding: Float[Array, "*rows"]
    counts: Bool[Array, "*rows"]
    unknown: Bool[Array, "*rows"]


def entries(
    ids: ArrayLike,
    log_probs: ArrayLike,
    student: Float[Array, "*rows _"],
    classes: int,
    counts: Bool[Array, "*rows"] | None,
    ignore_index: int | None,
) -> Entries:
    """Checks both arrays, by the rows of the student; rows without any class do not count."""
    rows = student.shape[:-1]
    ids = checks.integer("teacher_ids", ids, "; they come before the log-probabilities")
    if ids.ndim != len(rows) + 1 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        wanted = ", ".join([*map(str, rows), "k"])
        raise ValueError(
            f"teacher_ids must have shape ({wanted}), k > 0 class ids for each row of the loss, "
            f"got {ids.shape}"
        )
    log_probs = checks.floating("teacher_log_probs", log_probs)
    checks.shape_is("teacher_log_probs", log_probs, ids.shape, "that of teacher_ids")
    ids, log_probs = (sharded.rows_like(x, student) for x in (ids, log_probs))
    ids = checks.of_32_bits(ids)
    absent = _equal(ids, -1) | _equal(ids, ignore_index)
    valid = ~absent & (ids >= 0) & (ids < classes)
    ids = jnp.where(valid, jnp.where(valid, ids, 0).astype(jnp.int32), -1)
    has_any = jnp.any(~absent, -1)
    counts = checks.both(counts, has_any)
    ordered = jnp.sort(ids, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    unknown = counts & (jnp.any(~valid & ~absent, -1) | jnp.any(twice, -1))
    there = valid & counts[..., None]
    log_probs = jnp.where(there, log_probs, -jnp.inf)
    dtype = wide(student.dtype, log_probs.dtype)
    given, log_probs = log_probs.dtype, log_probs.astype(dtype)
    # Twice as much as if each logarithm, and what is computed of it, were rounded to one side.
    some = log_probs > -jnp.inf
    entropy = -jnp.sum(jnp.exp(log_probs) * jnp.where(some, log_probs, 0), -1)
    digits, more = (float(jnp.finfo(x).eps) for x in (given, dtype))
    rounding = digits * (1 + entropy) + 16 * more
    return Entries(jnp.where(there, ids, -1), log_probs, rounding, counts, unknown)


def _equal(ids: Integer[Array, "*rows k"], value: int | None) -> Bool[Array, "*rows k"]:
    found = checks.equal(ids, value)
    return jnp.zeros(ids.shape, bool) if found is None else found
