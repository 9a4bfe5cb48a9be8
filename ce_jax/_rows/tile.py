"""The mathematics of one tile of logits: statistics, their merge, and their pull-back.

Every softmax loss of this package is a function of a few numbers per row, which for logits `z`,
a target `t` and class coefficients `a` are

    lse         = log sum_c exp(z_c)
    cross       = <t, lse - z>              the cross-entropy of `t` with `softmax(z)`
    label_logit = z_y                       where `t` is the class id `y`
    uniform     = <a, lse - z>              over the classes with z > -inf, for label smoothing
    entropy     = lse - <softmax(z), z>

A row may come in one tile (dense logits), in many (blocks of `hidden @ kernel`) or spread over
devices: `partial_statistics` reads a tile, `merge` joins two partial results, `finish` turns the
joined one into the numbers above. Their derivative is one line, in `pullback`. With the cotangents
`g` of these numbers, `p = softmax(z)`, `T = sum(t)` and `A = sum(a)`:

    dz = (g_lse + T g_cross + A g_uniform) p - g_cross t - g_uniform a - g_entropy p (log p + H)

and `g_label_logit` more in the label's column. For a one-hot `t` and the loss `cross` alone that is
`p - y`. `T` is not assumed to be 1, as class weights, soft labels and smoothing make it any number.

All sums are kept relative to the row's maximum: `lse - z` computed from two large numbers would
lose the digits that `log p` is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._platform import from_label
from .._platform.from_label import at_label, is_label
from .._platform.narrow import narrowed
from .._platform.one_reading import read
from .._platform.parts import Shapes, best_shapes, row_argmax, row_maxima
from .partial import ABSENT, NOWHERE, Partial
from .sums import Columns, exp_shifted, finite_exponent, origin, shift, spread, sums


class Target(NamedTuple):
    """What a row is compared with; each part may be absent.

    Attributes:
      labels: class ids, counted from the first class of the whole row, not of the tile.
      probs: a weight for every class of the tile, instead of `labels`.
      classes: coefficients `a` of the part that is the same for all rows, one per class, or one for
        all classes.
      counts: whether the row counts. Others may hold anything: no derivative reaches them or comes
        from them, and their statistics are not to be used.
    """

    labels: Integer[Array, "*rows"] = ABSENT
    probs: Float[Array, "*rows classes"] = ABSENT
    classes: Float[Array, " classes"] | Float[Array, ""] = ABSENT
    counts: Bool[Array, "*rows"] | None = ABSENT


class RowStatistics(NamedTuple):
    """The numbers that losses are made of, one each per row; those not asked for are None."""

    lse: Float[Array, "*rows"]
    cross: Float[Array, "*rows"] = ABSENT
    label_logit: Float[Array, "*rows"] = ABSENT
    uniform: Float[Array, "*rows"] = ABSENT
    uniform_count: Float[Array, "*rows"] = ABSENT
    entropy: Float[Array, "*rows"] = ABSENT
    argmax: Integer[Array, "*rows"] = ABSENT


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which logits of `dtype` are accumulated: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def partial_statistics(
    z: Float[Array, "*rows classes"],
    target: Target,
    *,
    entropy: bool = False,
    argmax: bool = False,
    first_class: int | Integer[Array, ""] = 0,
    join_max: Callable[[Array], Array] | None = None,
    alone: bool = False,
    whole: bool = False,
) -> Partial:
    """Reads one tile, whose first column is class `first_class` of the row.

    `join_max` turns the maxima of a tile into those of whole rows, which the sums then are relative
    to. `alone` says that no derivative will be taken, `whole` that rows are, and hold their labels.
    """
    shapes = best_shapes(z, alone=alone, entropy=entropy)
    columns = Columns(target.probs, target.classes)
    labels_only = not (jax.tree.leaves(columns) or entropy or argmax)
    if whole and labels_only and from_label.is_worth_it(z):
        return _relative_to_labels(z, target, shapes, alone)
    if join_max is None:
        out = read(shapes, z, columns, wide(z.dtype), entropy=entropy)
        local_max = out.base
    else:
        local_max = row_maxima(z, shapes).astype(wide(z.dtype))
        row_max = join_max(local_max)
        found = sums(z, origin(row_max), columns, entropy=entropy, shapes=shapes, own_max=False)
        out = Partial(base=row_max, **found)
    if target.labels is not None:
        logit = _label_logit(z, target.labels, first_class, whole)
        out = out._replace(label_logit=logit.astype(out.base.dtype))
    if argmax:
        largest = row_argmax(z) + first_class
        if join_max is not None:
            largest = jnp.where(local_max == out.base, largest, NOWHERE)
        out = out._replace(argmax=largest)
    return out


def _relative_to_labels(
    z: Float[Array, "*rows classes"], target: Target, shapes: Shapes, alone: bool
) -> Partial:
    logit = at_label(z, target.labels).astype(wide(z.dtype))
    # Where narrow rows are cut, they share nothing with the pull-back, on purpose.
    shared = not alone and (z.dtype == logit.dtype or "cpu" not in shapes)
    found = from_label.sums(z, target.labels, logit, target.counts, shapes=shapes, shared=shared)
    attempt = found.attempt if shared else ABSENT
    return Partial(found.base, found.sum_exp, logit, attempt=attempt)


def finish(part: Partial, counts: Bool[Array, "*rows"] | None = None) -> RowStatistics:
    """Turns the sums over all classes of a row into its statistics."""
    log_sum = jnp.log(part.sum_exp)
    base = origin(part.base)
    out = RowStatistics(lse=base + log_sum, argmax=part.argmax)
    if part.label_logit is not None:
        if part.attempt is not None and part.attempt.bare is not None:
            own, rest, gap = part.attempt.bare
            cross = jnp.log1p(rest / own) - gap
        else:
            cross = log_sum - (part.label_logit - base)
        out = out._replace(cross=cross, label_logit=part.label_logit)
    if part.target_dot is not None:
        out = out._replace(cross=part.target_sum * log_sum - part.target_dot)
    if part.classes_dot is not None:
        out = out._replace(
            uniform=part.classes_sum * log_sum - part.classes_dot,
            uniform_count=part.classes_count,
        )
    if part.exp_dot is not None:
        out = out._replace(entropy=log_sum - part.exp_dot / part.sum_exp)
    return _batched_alike(out, part, counts)


def _batched_alike(
    out: RowStatistics, part: Partial, counts: Bool[Array, "*rows"] | None
) -> RowStatistics:
    """Adds a zero that depends on the whole target to each statistic.

    Under `vmap` over labels or weights alone, `lse` would be one for the whole batch. JAX from 0.12
    on takes no cotangent of such an output from a custom_vjp, as it could be counted too often.
    """
    zero = jnp.zeros((), out.lse.dtype)
    for x in (part.label_logit, part.target_sum, part.classes_sum, counts):
        if x is not None:
            zero = zero + ((x != x) & False).astype(zero.dtype)
    return jax.tree.map(lambda x: x + zero, out._replace(argmax=ABSENT))._replace(argmax=out.argmax)


def pullback(
    z: Float[Array, "*rows classes"],
    target: Target,
    part: Partial,
    g: RowStatistics,
    *,
    first_class: int | Integer[Array, ""] = 0,
    whole: bool = False,
) -> tuple[Float[Array, "*rows classes"], Target]:
    """Cotangents of a tile and of its target, from those of the statistics of the whole row.

    `part` is the merged one; `whole` says that there was but one tile. `z - base` and its
    exponential are written as in `partial_statistics`, so that XLA merges them when forward and
    backward are compiled together, and then keeps or recomputes the exponential as suits the
    platform: a CPU keeps it (an exponential costs more than memory traffic), a GPU recomputes it
    and holds nothing of this size.
    """
    shifted = shift(z, origin(part.base))
    if part.attempt is None:
        exp = exp_shifted(z, origin(part.base), own_max=whole)
    else:
        exp = from_label.exponentials(z, part.base, part.attempt)
    counts = target.counts
    if counts is not None:
        # Numbers that a cotangent of 0 makes 0, whatever the row holds.
        exp, shifted = (jnp.where(counts[..., None], x, 0) for x in (exp, shifted))
        part = jax.tree.map(lambda x: jnp.where(counts, x, 1), part._replace(attempt=ABSENT))
    log_sum = jnp.log(part.sum_exp)
    onto_p = g.lse
    if target.labels is not None:
        onto_p = onto_p + g.cross
    if target.probs is not None:
        onto_p = onto_p + part.target_sum * g.cross
    if target.classes is not None:
        onto_p = onto_p + part.classes_sum * g.uniform
    dz = exp * (onto_p / part.sum_exp)[..., None]
    d_target = Target()
    if target.labels is not None:
        onto_label = g.cross - g.label_logit
        dz = dz - jnp.where(is_label(target.labels, z, first_class), onto_label[..., None], 0)
    if target.probs is not None:
        dz = dz - g.cross[..., None] * target.probs.astype(dz.dtype)
        d_probs = g.cross[..., None] * (log_sum[..., None] - shifted)
        # Of a class with -inf, unless a row that counts has a share of it.
        absent = ((target.probs == 0) | (g.cross == 0)[..., None]) & (shifted == -jnp.inf)
        d_probs = narrowed(jnp.where(absent, 0, d_probs), target.probs.dtype)
        d_target = d_target._replace(probs=d_probs)
    if target.classes is not None:
        classes, allowed = spread(target.classes, z)
        dz = dz - g.uniform[..., None] * classes
        surprise = jnp.where(allowed, log_sum[..., None] - shifted, 0)
        d_classes = g.uniform[..., None] * surprise
        rows = range(z.ndim - target.classes.ndim)
        d_target = d_target._replace(classes=jnp.sum(d_classes, tuple(rows)))
    if part.exp_dot is not None:
        # log p + H is (z - base) - exp_dot / sum_exp: the logarithm of the sum cancels.
        mean = part.exp_dot / part.sum_exp
        onto_log_p = (g.entropy / part.sum_exp)[..., None]
        dz = dz - exp * onto_log_p * (finite_exponent(shifted) - mean[..., None])
    return dz, d_target


def _label_logit(
    z: Float[Array, "*rows classes"],
    labels: Integer[Array, "*rows"],
    first_class: int | Integer[Array, ""],
    whole: bool,
) -> Float[Array, "*rows"]:
    """The logit of the label, 0 where the label is not in this tile."""
    spec = jax.typeof(z).sharding.spec
    if spec and spec[-1] is not None:
        # JAX refuses to gather along an axis that it knows to be sharded (explicit axis types).
        return jnp.sum(jnp.where(is_label(labels, z, first_class), z, 0), -1)
    # A gather of one element per row is far cheaper than comparing every class with the label.
    if whole:
        return at_label(z, labels)
    local = labels - first_class
    inside = (local >= 0) & (local < z.shape[-1])
    return jnp.where(inside, at_label(z, jnp.where(inside, local, 0)), 0)
