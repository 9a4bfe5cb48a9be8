"""The loss of a row from its statistics. Plain functions: JAX differentiates them."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float

from .numerics import weighted
from .tile import RowStatistics

_Tree = TypeVar("_Tree")


def softmax_loss(
    statistics: RowStatistics,
    label_weight: Float[Array, "*rows"] | None,
    label_smoothing: ArrayLike | None,
    z_loss: ArrayLike | None = None,
    *,
    classes: int,
) -> Float[Array, "*rows"]:
    """`(1 - eps) w_y cross + eps C / K uniform + z_loss lse**2`, `K` of `C` classes being allowed.

    With `cross = lse - z_y` and `uniform = sum_c (w_c / C) (lse - z_c)` this is the cross-entropy
    of the weighted and smoothed target `t`, `T lse - <t, z>`, written without building `t`. Of soft
    labels `cross` is `sum_c w_c q_c (lse - z_c)`, and no `label_weight` is left to apply.
    """
    loss = statistics.cross
    dtype = loss.dtype
    if label_weight is not None:
        loss = weighted(label_weight, loss)
    if label_smoothing is not None:
        eps = jnp.asarray(label_smoothing, dtype)
        loss = weighted(1 - eps, loss)
        loss = loss + eps * classes / statistics.uniform_count * statistics.uniform
    if z_loss is not None:
        loss = loss + jnp.asarray(z_loss, dtype) * statistics.lse * statistics.lse
    return loss


def counted(counts: Bool[Array, "*rows"] | None, x: _Tree) -> _Tree:
    """`x`, with 1 in rows that do not count.

    Such a row may hold an infinite loss, which is masked later. Its derivative would then be
    infinity times 0, which is NaN. A loss of statistics that are all 1 is finite.
    """
    if counts is None:
        return x
    return jax.tree.map(lambda x: jnp.where(counts, x, 1), x)


def smoothing_coefficients(
    weight: Float[Array, " local"] | None, classes: int, dtype: DTypeLike
) -> Float[Array, " local"] | Float[Array, ""]:
    """`w / C` for the local ones of `C` classes: a mean where a sum of huge logits overflows."""
    return jnp.asarray(1 / classes, dtype) if weight is None else weight / classes
