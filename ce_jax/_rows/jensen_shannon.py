"""Jensen-Shannon divergence between two softmaxes of each row, in blocks of classes.

With the mixture `m = s p + (1 - s) q` it is `s KL(p || m) + (1 - s) KL(q || m)`. What m is in a
class takes both normalisers: blocks are read once for these and again for the sums, which then are
plain ones, and a third time for the gradient. Of logits `u` of p and `v` of q, and with the
cotangent `g`, that is

    du = g s p (log(p / m) - KL(p || m))        dv = g (1 - s) q (log(q / m) - KL(q || m))

and that of `s` is `g (KL(p || m) - KL(q || m))`.

Each divergence is a sum of terms `p log(p / m) - p + m`. None is negative, and where p and q are
nearly equal each is of second order in their difference, with all its digits: `m / p` is then found
as `1 + (1 - s) (q / p - 1)`, and its logarithm by `log1p`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _platform
from . import sharded, tile
from .columns import Form, over_columns, sums_of
from .divergence import Inputs, Options, Tiles, Used, nothing, parts, tiles
from .numerics import expm1_less_small, weighted
from .order import Counting
from .picked import First
from .tile import Partial, merge


class _Normalisers(NamedTuple):
    p: Partial
    q: Partial


class _Sums(NamedTuple):
    """Over the classes seen so far: KL(p || m), KL(q || m), and the two weighted with the shares.

    `of` are the normalisers of whole rows.
    """

    of: _Normalisers
    p: Float[Array, "*rows"]
    q: Float[Array, "*rows"]
    both: Float[Array, "*rows"]


def jensen_shannon(
    options: Options, inputs: Inputs, used: Used, counting: Counting, *, forward_mode: bool
) -> Float[Array, "*rows"]:
    """The divergence of each row, where p has `inputs.share`; 0 in rows that are not `used`."""
    axis_name = options.p.axis_name
    normalisers = Form(
        start=_no_classes,
        fold=functools.partial(_normalise, options),
        across=functools.partial(_merged, axis_name),
        finish=_finish,
        pull=functools.partial(_pull, options),
        parts=parts(options, inputs),
        columns=options.p.local,
        block=options.p.block,
        rows=inputs.p.rows.shape[0],
        tile=options.p.tile,
    )
    form = normalisers._replace(
        start=functools.partial(_start, normalisers),
        fold=functools.partial(_fold, options),
        across=functools.partial(_added, axis_name),
    )
    return over_columns(form, inputs, used, counting, forward_mode=forward_mode)


def _no_classes(inputs: Inputs, used: Used, _: Counting) -> _Normalisers:
    part = nothing(inputs, used)
    return _Normalisers(part, part)


def _normalise(
    options: Options, inputs: Inputs, used: Used, seen: _Normalisers, first: First
) -> _Normalisers:
    both, _ = tiles(options, inputs, used, first)
    new = (Partial(*_platform.normaliser(z, of.base)) for z, of in zip(both, seen, strict=True))
    return _Normalisers(*map(merge, seen, new))


def _merged(axis_name: str | None, of: _Normalisers) -> _Normalisers:
    return _Normalisers(*(sharded.merge_across(x, axis_name) for x in of))


def _start(normalisers: Form, inputs: Inputs, used: Used, counting: Counting) -> _Sums:
    of = sums_of(normalisers, inputs, used, counting)
    zero = jnp.zeros_like(of.p.sum_exp)
    return _Sums(of, zero, zero, zero)


def _fold(options: Options, inputs: Inputs, used: Used, seen: _Sums, first: First) -> _Sums:
    both, _ = tiles(options, inputs, used, first)
    p, q = _platform.two_sums(*(x.terms for x in _compared(both, seen.of, inputs.share)))
    mixed = inputs.share * p + (1 - inputs.share) * q
    return seen._replace(p=seen.p + p, q=seen.q + q, both=seen.both + mixed)


def _added(axis_name: str | None, seen: _Sums) -> _Sums:
    p, q, both = (sharded.sum_over(x, axis_name) for x in seen[1:])
    return seen._replace(p=p, q=q, both=both)


def _finish(seen: _Sums) -> Float[Array, "*rows"]:
    return seen.both


# Where one of two probabilities is e^80 times the other, that one is nothing beside it.
_FARTHEST = 80.0


class _Compared(NamedTuple):
    """A softmax `p` beside the mixture: `log(p / m)`, and the terms of KL(p || m)."""

    probs: Float[Array, "*rows block"]
    ahead: Float[Array, "*rows block"]
    terms: Float[Array, "*rows block"]


def _compared(
    both: Tiles, of: _Normalisers, share: Float[Array, ""]
) -> tuple[_Compared, _Compared]:
    log_p, log_q = (
        tile.shift(z, x.base) - jnp.log(x.sum_exp)[..., None] for z, x in zip(both, of, strict=True)
    )
    banned = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    ahead = jnp.where(banned, 0, log_q) - jnp.where(banned, 0, log_p)
    q_larger = ahead > 0
    apart = jnp.minimum(jnp.where(q_larger, ahead, -ahead), _FARTHEST)
    more, less, inverse = _ratios(apart)
    of_larger = jnp.where(q_larger, 1 - share, share)
    of_smaller = jnp.where(q_larger, share, 1 - share)
    log_of_larger = jnp.log(of_larger + of_smaller * inverse)  # of m over the larger
    p, q = jnp.exp(log_p), jnp.exp(log_q)

    def beside(p: Array, q: Array, q_by_p: Array, other: Array) -> _Compared:
        excess = other * q_by_p  # m / p - 1
        precise, near = excess > -0.5, jnp.abs(excess) <= 0.5
        log_ratio = jnp.where(precise, jnp.log1p(jnp.where(precise, excess, 0)), log_of_larger)
        of_near = p * expm1_less_small(jnp.where(near, log_ratio, 0))
        return _Compared(p, -log_ratio, jnp.where(near, of_near, other * (q - p) - p * log_ratio))

    of_p, of_q = jnp.where(q_larger, more, less), jnp.where(q_larger, less, more)
    return beside(p, q, of_p, 1 - share), beside(q, p, of_q, share)


@jax.custom_jvp
def _ratios(apart: Array) -> tuple[Array, Array, Array]:
    """`e^x - 1`, `e^-x - 1` and `e^-x` for x >= 0, with all digits in derivatives, too."""
    more = jnp.expm1(apart)
    inverse = 1 / (1 + more)
    return more, -more * inverse, inverse


@_ratios.defjvp
def _ratios_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (apart,), (d,) = primals, tangents
    more, less, inverse = _ratios(apart)
    return (more, less, inverse), ((1 + more) * d, -inverse * d, -inverse * d)


def _pull(
    options: Options,
    inputs: Inputs,
    used: Used,
    seen: _Sums,
    g: Float[Array, "*rows"],
    first: First,
) -> Inputs:
    both, pull = tiles(options, inputs, used, first)
    p, q = _compared(both, seen.of, inputs.share)
    share, g = inputs.share, g[..., None]

    def onto(x: _Compared, share: Array, divergence: Array) -> Array:
        return weighted(g, share * x.probs * (x.ahead - divergence[..., None]))

    d_share = jnp.sum(weighted(g, p.terms - q.terms))
    return pull((onto(p, share, seen.p), onto(q, 1 - share, seen.q)))._replace(share=d_share)
