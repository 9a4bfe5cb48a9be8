"""Row statistics of logits that are held in memory, with the fused derivative."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import _platform
from . import sharded, tile
from .dtypes import wide
from .picked import pick
from .tile import ABSENT, Partial, RowStatistics, Target


class _Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      statistics: whether entropy and argmax are wanted, too.
      axis_name: mapped mesh axis over which the classes are sharded.
    """

    statistics: bool
    axis_name: str | None


def row_statistics(
    logits: Float[Array, "*rows classes"],
    target: Target,
    counts: Bool[Array, "*rows"] | None = None,
    *,
    statistics: bool = False,
    axis_name: str | None = None,
    forward_mode: bool = False,
) -> RowStatistics:
    """Statistics of each row of `logits`, differentiable but for `argmax`.

    Args:
      logits: the class axis is the last one.
      target: what the rows are compared with; an id that is not a class matches no column.
      counts: whether the row counts. Others may hold anything: their statistics are 0, and no
        derivative reaches them or comes from them.
      statistics: whether entropy and argmax are wanted, too.
      axis_name: mapped mesh axis over which the classes are sharded.
      forward_mode: leave the derivative to JAX, which then can also push tangents forward.
    """
    sharded.check_sharded("logits", logits, axis_name)
    # Over explicit mesh axes, all goes where the logits are.
    labels, picked, counts = jax.tree.map(
        lambda x: sharded.rows_like(x, logits), (target.labels, target.picked, counts)
    )
    probs = jax.tree.map(lambda x: sharded.with_sharding_of(x, logits), target.probs)
    target = target._replace(labels=labels, picked=picked, probs=probs)
    # Not `counts` itself: statistics depend on it, and are alike on all devices of `axis_name`.
    logits = logits if counts is None else sharded.like(logits, counts)
    logits, target = sharded.align((logits, target))
    if counts is not None:
        silence = zeroed if forward_mode else _constant_unless
        logits = silence(counts, logits)
    options = _Options(statistics, axis_name)
    if forward_mode:
        logits = logits.astype(wide(logits.dtype))  # so that cotangents add up in it
        found, _ = _whole_rows(options, logits, target, counts)
    else:
        found = _fused(options, logits, target, counts)
    if counts is None:
        return found
    silent = jax.tree.map(lambda x: jnp.where(counts, x, 0), found)
    return silent._replace(uniform_count=found.uniform_count)  # is divided by


def zeroed(
    counts: Bool[Array, "*rows"], logits: Float[Array, "*rows classes"]
) -> Float[Array, "*rows classes"]:
    """The logits, 0 in rows that do not count."""
    return jnp.where(counts[..., None], logits, 0)


@jax.custom_jvp
def _constant_unless(
    counts: Bool[Array, "*rows"], logits: Float[Array, "*rows classes"]
) -> Float[Array, "*rows classes"]:
    """The logits, as constants in rows that do not count.

    Whatever such a row holds, and whatever was computed of it, its derivatives of any order are 0.
    To set the logits themselves to 0 would take a copy of them.
    """
    del counts
    return logits


@_constant_unless.defjvp
def _constant_unless_jvp(
    primals: tuple[Array, Array], tangents: tuple[Any, Array]
) -> tuple[Array, Array]:
    (counts, logits), (_, d_logits) = primals, tangents
    return _constant_unless(counts, logits), zeroed(counts, d_logits)


# Traced once, for the statistics and for the rule of their derivative.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _whole_rows(
    options: _Options, logits: Array, target: Target, counts: Array | None
) -> tuple[RowStatistics, Partial]:
    first_class = sharded.first_class(logits.shape[-1], options.axis_name)
    logits, picked = pick(logits, target.picked, first_class)
    if options.axis_name is not None:
        # Relative to the maximum of all devices, as the gradient's exponentials are.
        row_max = sharded.max_over(tile.row_maxima(logits), options.axis_name)
        normaliser = row_max, tile.sum_exp(logits, row_max)
    else:
        normaliser = _platform.normaliser(logits)
    part = _platform.read(
        logits,
        target,
        normaliser,
        entropy=options.statistics,
        argmax=options.statistics,
        first_class=first_class,
    )
    part = sharded.merge_across(part._replace(picked=picked), options.axis_name)
    if counts is not None:
        # All but the maximum, so that the gradient finds the exponentials as they are in memory.
        harmless = jax.tree.map(lambda x: jnp.where(counts, x, 1), part)
        part = harmless._replace(base=part.base)
    return tile.finish(part), part


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options: _Options, logits: Array, target: Target, counts: Array | None) -> RowStatistics:
    return _whole_rows(options, logits, target, counts)[0]


_Residuals = tuple[Array, Target, Array | None, Partial]


def _fused_fwd(options: _Options, *primals: Any) -> tuple[RowStatistics, _Residuals]:
    given: Any = jax.tree.map(lambda x: x.value, primals)
    found, part = _whole_rows(options, *given)
    return found, (*given, part)


def _fused_bwd(
    options: _Options, residuals: _Residuals, g: RowStatistics
) -> tuple[Array, Target, None]:
    return *_pulled_back(options, residuals, tile.cotangents(g)), None


# As a whole for those who differentiate outside `jit`, where it would be run step by step.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _pulled_back(
    options: _Options, residuals: _Residuals, g: RowStatistics
) -> tuple[Array, Target]:
    # A scalar may come as a literal.
    logits, target, counts, part = jax.tree.map(jnp.asarray, residuals)
    first_class = sharded.first_class(logits.shape[-1], options.axis_name)
    logits, part = _platform.reread(logits, part)
    dz, d_target = tile.pullback(logits, target, part, g, first_class=first_class)
    of_numbers = target._replace(labels=ABSENT, picked=ABSENT)
    d_target = jax.tree.map(sharded.with_sharding_of, d_target, of_numbers)
    if counts is not None:  # as `_constant_unless` does later; `jax_debug_nans` looks before that
        dz = zeroed(counts, dz)
    return dz.astype(logits.dtype), d_target


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)
