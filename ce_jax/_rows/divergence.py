"""Kullback-Leibler divergence between two softmaxes of each row, in blocks of classes.

With logits `u` of `p = softmax(u)` and `v` of `q = softmax(v)`, each less its maximum:

    KL(p || q) = <p, u - v> - log sum exp(u) + log sum exp(v)

One pass over the classes gathers this in sums that merge like those of `_rows.tile`. Where p and q
agree, `u - v` is small, where a cross-entropy less an entropy would be the difference of large
numbers. With the cotangent `g` the derivative is

    du = g p (log p - log q - KL)        dv = g (q - p)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .. import _platform
from . import class_blocks, sharded
from .columns import Form, Part, over_columns
from .dtypes import wide
from .head import Head, Tokens
from .numerics import not_negative, tempered, tempered_rows, weighted
from .order import Counting
from .picked import First
from .tile import ABSENT, Partial, merge, no_classes, row_maxima, shift

# Which rows are used; None for all.
Used = Bool[Array, "*rows"] | None


class Side(NamedTuple):
    """One of the two softmaxes: its logits, or hidden states and the head that they go through."""

    rows: Float[Array, "*rows _"]
    head: Head = ABSENT


class Inputs(NamedTuple):
    """What a divergence is a function of. An absent temperature is 1.

    `share` is that of p in the mixture that `_rows.jensen_shannon` compares both with.
    """

    p: Side
    q: Side
    temperature: Float[Array, "*rows"] | None = None
    share: Float[Array, ""] = ABSENT


class Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      p: how p's logits are computed from its layer, if it has one.
      q: the same of q.
    """

    p: class_blocks.Options
    q: class_blocks.Options


class _Sums(NamedTuple):
    """Over the classes seen so far, relative to both maxima: of p, of q, and `<exp(u), u - v>`."""

    p: Partial
    q: Partial
    gap: Float[Array, "*rows"]


def divergence(
    options: Options, inputs: Inputs, used: Used, counting: Counting, *, forward_mode: bool
) -> Float[Array, "*rows"]:
    """KL(p || q) of each row, of logits divided by the temperature; 0 in rows that are not `used`.

    In these all logits are taken as 0: they may ban a class on one side only, which would make the
    divergence infinite.

    Where the rows that count come first, `counting` is how many these are.
    """
    form = Form(
        start=_start,
        fold=functools.partial(_fold, options),
        across=functools.partial(_across, options.p.axis_name),
        finish=_finish,
        pull=functools.partial(_pull, options),
        parts=parts(options, inputs),
        columns=options.p.local,
        block=options.p.block,
        rows=inputs.p.rows.shape[0],
        tile=options.p.tile,
    )
    return over_columns(form, inputs, used, counting, forward_mode=forward_mode)


def parts(options: Options, inputs: Inputs) -> Any:
    """What a block of classes reads."""
    by_row: Any = Part(by_row=True)

    def of(side: Side, class_axis: int) -> Side:
        if side.head is None:
            return Side(by_row._replace(axis=side.rows.ndim - 1))
        return Side(by_row, class_blocks.head_parts(side.head, class_axis, side.rows.dtype))

    sides = of(inputs.p, options.p.class_axis), of(inputs.q, options.q.class_axis)
    temperature = None if inputs.temperature is None else by_row
    share: Any = None if inputs.share is None else Part()
    return Inputs(*sides, temperature, share)


Tiles = tuple[Float[Array, "*rows block"], Float[Array, "*rows block"]]


def tiles(
    options: Options, inputs: Inputs, used: Used, first: First
) -> tuple[Tiles, Callable[[Tiles], Inputs]]:
    """Logits of a block of classes of both sides, and the function that pulls cotangents back."""
    u, pull_u = _tile_of(options.p, inputs.p, first)
    v, pull_v = _tile_of(options.q, inputs.q, first)
    dtype = jnp.promote_types(u.dtype, v.dtype)
    temper, of_logits = tempered_rows, inputs.p.head is None and inputs.q.head is None
    alone = all(x.block >= x.local for x in options)  # no other block is to be merged
    if alone and (of_logits or options.p.axis_name is None):
        temper = functools.partial(_tempered_differences, options.p.axis_name)
    both, pull_both = jax.vjp(
        functools.partial(_both, dtype, used, temper), u, v, inputs.temperature
    )

    def pull(d: Tiles) -> Inputs:
        du, dv, d_temperature = pull_both(d)
        return Inputs(pull_u(du), pull_v(dv), d_temperature)

    return both, pull


def _tile_of(
    options: class_blocks.Options, side: Side, first: First
) -> tuple[Array, Callable[[Array], Side]]:
    if side.head is None:
        z = side.rows.astype(wide(side.rows.dtype))
        z = sharded.without_padding(z, first, options.classes, options.local, options.axis_name)
        return z, Side
    z, pull = class_blocks.block_logits(options, Tokens(side.rows), side.head, first)

    def pull_layer(dz: Array) -> Side:
        d_tokens, d_head = pull(dz)
        return Side(d_tokens.hidden, d_head)

    return z, pull_layer


def _both(
    dtype: DTypeLike,
    used: Used,
    temper: Callable[[Array, Array], Array],
    u: Array,
    v: Array,
    temperature: Array | None,
) -> Tiles:
    u, v = u.astype(dtype), v.astype(dtype)
    if used is not None:
        u, v = (jnp.where(used[..., None], z, 0) for z in (u, v))
    if temperature is None:
        return u, v
    return temper(u, temperature), temper(v, temperature)


def _tempered_differences(
    axis_name: str | None, z: Float[Array, "*rows classes"], temperature: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """Relative to the largest logit of the row: a divergence needs no more."""
    row_max = sharded.max_over(row_maxima(z), axis_name)
    return tempered(shift(z, row_max), temperature)


def nothing(inputs: Inputs, used: Used) -> Partial:
    """The normaliser of no classes, of p or of q.

    In a row that is not used, that of one class with the logit 0: if no block visits the row, its
    divergence is 0.
    """
    p, q = inputs.p.rows, inputs.q.rows
    base, sum_exp = no_classes(p.shape[:-1], wide(p.dtype, q.dtype))
    if used is None:
        return Partial(base, sum_exp)
    return Partial(jnp.where(used, base, 0), jnp.where(used, sum_exp, 1))


def _start(inputs: Inputs, used: Used, _: Counting) -> _Sums:
    part = nothing(inputs, used)
    return _Sums(part, part, jnp.zeros_like(part.sum_exp))


def _fold(options: Options, inputs: Inputs, used: Used, sums: _Sums, first: First) -> _Sums:
    both, _ = tiles(options, inputs, used, first)
    p, q = (
        Partial(*_platform.normaliser(z, seen.base))
        for z, seen in zip(both, (sums.p, sums.q), strict=True)
    )
    u, v = shift(both[0], p.base), shift(both[1], q.base)
    ahead = _where_possible(u > -jnp.inf, u, v)
    terms = jnp.where(ahead == jnp.inf, ahead, jnp.exp(u) * ahead)  # exponentials may round to 0
    gap = _rebased(sums, p.base, q.base) + jnp.sum(terms, -1)
    return _Sums(merge(sums.p, p), merge(sums.q, q), gap)


def _where_possible(possible: Array, u: Array, v: Array) -> Array:
    """`u - v`, but 0 elsewhere: of what is banned on both sides it would be NaN."""
    return jnp.where(possible, u, 0) - jnp.where(possible, v, 0)


def _rebased(
    sums: _Sums, p_max: Float[Array, "*rows"], q_max: Float[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The gap relative to other maxima."""
    by_p, by_q = sums.p.base - p_max, sums.q.base - q_max
    scale = jnp.where(sums.p.sum_exp == 0, 0, jnp.exp(by_p))
    gap = scale * (sums.gap + sums.p.sum_exp * (by_p - by_q))
    infinite = jnp.where(sums.gap == jnp.inf, sums.gap, 0)  # also if the scale rounds to 0
    return jnp.where(scale == 0, 0, gap) + infinite


def _across(axis_name: str | None, sums: _Sums) -> _Sums:
    if axis_name is None:
        return sums
    p, q = (sharded.merge_across(x, axis_name) for x in (sums.p, sums.q))
    return _Sums(p, q, sharded.sum_over(_rebased(sums, p.base, q.base), axis_name))


def _finish(sums: _Sums) -> Float[Array, "*rows"]:
    ahead = jnp.log(sums.q.sum_exp) - jnp.log(sums.p.sum_exp)
    return not_negative(sums.gap / sums.p.sum_exp + ahead)


def _pull(
    options: Options,
    inputs: Inputs,
    used: Used,
    sums: _Sums,
    g: Float[Array, "*rows"],
    first: First,
) -> Inputs:
    (u, v), pull = tiles(options, inputs, used, first)
    u, v = shift(u, sums.p.base), shift(v, sums.q.base)
    exp = jnp.exp(u)
    p = exp / sums.p.sum_exp[..., None]
    q = jnp.exp(v) / sums.q.sum_exp[..., None]
    # log p - log q - KL: the logarithms of the sums cancel. A row that weighs nothing may be inf.
    mean = sums.gap / sums.p.sum_exp
    ahead = _where_possible(exp > 0, u, v) - mean[..., None]
    g = g[..., None]
    return pull((weighted(g, p * ahead), weighted(g, q - p)))
