"""Row statistics of logits in memory that are divided by a temperature."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import dense, sharded, tile
from .numerics import tempered
from .tile import RowStatistics, Target


def row_statistics(
    logits: Float[Array, "*rows classes"],
    target: Target,
    counts: Bool[Array, "*rows"] | None,
    temperature: Float[Array, "*rows"] | None,
    *,
    statistics: bool = False,
    axis_name: str | None = None,
    forward_mode: bool = False,
) -> RowStatistics:
    """As `dense.row_statistics`, of logits over a temperature, in the accumulation dtype."""
    statistics_of = functools.partial(
        dense.row_statistics,
        statistics=statistics,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    if temperature is None:
        return statistics_of(logits, target, counts)
    sharded.check_sharded("logits", logits, axis_name)
    if counts is not None:
        logits, temperature = dense.zeroed(counts, logits), jnp.where(counts, temperature, 1)
    # Relative to the maximum before it is divided: so the digits of `lse - z` survive.
    row_max = sharded.max_over(tile.row_maxima(logits), axis_name)
    relative = tempered(tile.shift(logits, row_max), temperature)
    found = statistics_of(relative, target, counts)
    if found.picked is not None:  # which is relative to the maximum anyhow
        return found
    ahead = row_max / temperature
    found = found._replace(lse=found.lse + ahead)
    if found.label_logit is not None:
        banned = jnp.isinf(found.label_logit) & jnp.isfinite(row_max)
        label_logit = found.label_logit + jnp.where(banned, 0, ahead)
        found = found._replace(label_logit=label_logit)
    return found
