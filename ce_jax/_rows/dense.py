"""Row statistics of logits that are held in memory, with the fused derivative."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from .._platform.narrow import narrowed
from .._platform.parts import differs_alone, in_long_rows
from . import sharded, tile
from .partial import ABSENT, Partial


def row_statistics(
    logits: Float[Array, "*rows classes"],
    target: tile.Target,
    *,
    entropy: bool = False,
    argmax: bool = False,
    axis_name: str | None = None,
    forward_mode: bool = False,
) -> tile.RowStatistics:
    """Statistics of each row of `logits`, differentiable but for `argmax`.

    Args:
      logits: the class axis is the last one.
      target: what the rows are compared with; class ids must lie in the row. The statistics of
        rows that do not count are 0, and their derivatives too.
      entropy: whether `entropy` is wanted.
      argmax: whether `argmax` is wanted.
      axis_name: mapped mesh axis over which the classes are sharded.
      forward_mode: leave the derivative to JAX, which then can also push tangents forward.
    """
    sharded.check_sharded("logits", logits, axis_name)
    counts = target.counts
    logits, target = sharded.align((logits, target))
    # As it came: statistics depend on it, and are alike on all devices of `axis_name`.
    target = target._replace(counts=counts)
    options = (entropy, argmax, axis_name)
    if forward_mode:
        if counts is not None:
            logits = jnp.where(counts[..., None], logits, 0)
        dtype = tile.wide(logits.dtype)  # so that cotangents add up in it
        logits = logits.astype(dtype)
        if target.probs is not None:  # what is neither allowed nor wanted has derivative 0
            absent = (target.probs == 0) & (logits == -jnp.inf)
            target = target._replace(probs=jnp.where(absent, 0, target.probs.astype(dtype)))
        found = _statistics(options, False, logits, target)[0]
    else:
        # The mesh as it is, but named: jax 0.10 names it in the rules of a custom_vjp alone, and
        # traces again what it traced in another context.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            found = _fused(options, logits, target)
    if counts is None:
        return found
    count = found.uniform_count  # is divided by
    found = jax.tree.map(lambda x: jnp.where(counts, x, 0), found)
    return found if count is None else found._replace(uniform_count=jnp.where(counts, count, 1))


_Options = tuple[bool, bool, str | None]


# Compiled as part of its caller; traced once for value and derivative, unless `alone` differs.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _statistics(
    options: _Options,
    alone: bool,
    logits: Float[Array, "*rows classes"],
    target: tile.Target,
) -> tuple[tile.RowStatistics, Partial]:
    entropy, argmax, axis_name = options
    first_class = sharded.first_class(logits.shape[-1], axis_name)
    # Sums relative to the maximum of all devices add up what the gradient needs anyway.
    join_max = None
    if axis_name is not None:
        join_max = functools.partial(sharded.max_over, axis_name=axis_name)
    part = tile.partial_statistics(
        logits,
        target,
        entropy=entropy,
        argmax=argmax,
        first_class=first_class,
        join_max=join_max,
        alone=alone,
        whole=axis_name is None,
    )
    part = sharded.sum_across(part, axis_name)
    return tile.finish(part, target.counts), part


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    options: _Options, logits: Float[Array, "*rows classes"], target: tile.Target
) -> tile.RowStatistics:
    return _statistics(options, differs_alone(logits), logits, target)[0]


@jax.custom_jvp
def _constant_unless(
    counts: Bool[Array, "*rows"], logits: Float[Array, "*rows classes"]
) -> Float[Array, "*rows classes"]:
    """The logits, as constants in rows that do not count.

    To set those to 0 would cost a CPU a copy of all logits. What derivative there is, of any order,
    is set to 0 instead, where it is computed: the first one in `tile.pullback`, others here.
    """
    del counts
    return logits


@_constant_unless.defjvp
def _constant_unless_jvp(
    primals: tuple[Array, Array], tangents: tuple[Any, Array]
) -> tuple[Array, Array]:
    (counts, logits), (_, d_logits) = primals, tangents
    return _constant_unless(counts, logits), jnp.where(counts[..., None], d_logits, 0)


_Residuals = tuple[ArrayLike, tile.Target, Partial]


def _fused_fwd(
    options: _Options, logits: Array, target: tile.Target
) -> tuple[tile.RowStatistics, _Residuals]:
    if target.counts is not None:
        logits = _constant_unless(target.counts, logits)
    statistics, part = _statistics(options, False, logits, target)
    return statistics, (logits, target, part)


def _fused_bwd(
    options: _Options, residuals: _Residuals, g: tile.RowStatistics
) -> tuple[Array, tile.Target]:
    return _pulled_back(options, residuals, g._replace(argmax=ABSENT))


# As a whole for those who differentiate outside `jit`, where it would be run step by step.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _pulled_back(
    options: _Options, residuals: _Residuals, g: tile.RowStatistics
) -> tuple[Array, tile.Target]:
    logits, target, part = jax.tree.map(jnp.asarray, residuals)  # a scalar may come as a literal
    _, _, axis_name = options
    first_class = sharded.first_class(logits.shape[-1], axis_name)
    dz, d_target = tile.pullback(
        logits, target, part, g, first_class=first_class, whole=axis_name is None
    )
    d_target = jax.tree.map(
        sharded.with_sharding_of, d_target, target._replace(labels=ABSENT, counts=ABSENT)
    )
    if dz.dtype != logits.dtype:
        dz = in_long_rows(lambda dz: narrowed(dz, logits.dtype), dz)
    return dz, d_target


_fused.defvjp(_fused_fwd, _fused_bwd)
