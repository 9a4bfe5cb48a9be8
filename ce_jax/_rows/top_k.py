"""Divergence from a teacher of which a few classes per row are known.

All other classes together are one class, the rest. With `p` and `q` of teacher and student over
the classes that are known, and their rests `p_r` and `q_r`,

    bucket       sum_k p_k log(p_k / q_k) + p_r log(p_r / q_r)
    renormalize  the same with p_k / sum(p) for p_k, and without the rest, which is 0
    drop         sum_k p_k log(p_k / q_k)

Each term is found as `p log(p / q) - p + q`, which is never negative and keeps its digits where p
and q agree. The sum of all `-p + q` is known and taken off again: it is `q_r - p_r` without the
term of the rest, and 0 with it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .numerics import divergence_terms, one_minus_exp
from .tile import RowStatistics, finite_maximum

# The sum of probabilities whose logarithms were rounded to bfloat16 exceeds 1 by at most this.
_SURPLUS = 0.1
# No dtype holds a probability with a logarithm below this. A class may be masked by a finite logit.
_IMPOSSIBLE = -1e4

Tail: TypeAlias = Literal["bucket", "renormalize", "drop"]


def top_k_divergence(
    found: RowStatistics,
    log_p: Float[Array, "*rows k"],
    rounding: Float[Array, "*rows"],
    tail: Tail,
) -> Float[Array, "*rows"]:
    """The loss of each row, given the student's statistics with these classes picked.

    If the student allows no other class, a rest of no more than `rounding` is none.
    """
    logits = jnp.concatenate([found.picked, found.lse[..., None]], -1)
    log_q = _log_softmax(logits)
    log_q, log_rest_q = log_q[..., :-1], log_q[..., -1]
    log_sum = _log_sum_exp(log_p)
    if tail == "renormalize":
        return jnp.sum(_terms(log_p - log_sum[..., None], log_q), -1) + jnp.exp(log_rest_q)
    loss, rest = jnp.sum(_terms(log_p, log_q), -1), one_minus_exp(log_sum)
    if tail == "drop":
        return loss + jnp.exp(log_rest_q) - rest
    is_none = (rest <= 0) | (log_rest_q < _IMPOSSIBLE) & (rest <= rounding)
    log_rest = jnp.where(is_none, -jnp.inf, jnp.log(jnp.where(is_none, 1, rest)))
    missing = jnp.where(rest < -_SURPLUS, jnp.nan, jnp.where(is_none, rest, 0))
    return loss + _terms(log_rest, log_rest_q) - missing


def _terms(log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
    return divergence_terms(jnp.exp(log_p), log_p, log_q)


def _largest(
    x: Float[Array, "*rows k"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows k"], Bool[Array, "*rows k"]]:
    """The largest entry of each row, all relative to it, and which it is: the first of several."""
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    is_it = ids == jax.lax.argmax(x, x.ndim - 1, jnp.int32)[..., None]
    highest = jnp.sum(jnp.where(is_it, x, 0), -1)
    return highest, x - finite_maximum(highest)[..., None], is_it


def _log_of_others(relative: Float[Array, "*rows k"], is_it: Bool[Array, "*rows k"]) -> Array:
    """What the log-sum of exponentials is above the largest: `log1p` sees the smallest share."""
    return jnp.log1p(jnp.sum(jnp.where(is_it, 0, jnp.exp(relative)), -1))


def _log_sum_exp(x: Float[Array, "*rows k"]) -> Float[Array, "*rows"]:
    highest, *others = _largest(x)
    return highest + _log_of_others(*others)


def _log_softmax(x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
    _, relative, is_it = _largest(x)
    return relative - _log_of_others(relative, is_it)[..., None]
