"""The mathematics of one tile of logits: statistics, their merge, and their pull-back.

Every softmax loss of this package is a function of a few numbers per row, which for logits `z`,
a target `t` and class coefficients `a` are

    lse         = log sum_c exp(z_c)
    cross       = <t, lse - z>              the cross-entropy of `t` with `softmax(z)`
    label_logit = z_y                       where `t` is the class id `y`
    uniform     = <a, lse - z>              over the classes with z > -inf, for label smoothing
    entropy     = lse - <softmax(z), z>

A row may come in one tile (dense logits), in many (blocks of `hidden @ kernel`) or spread over
devices: `read` reads a tile, `merge` joins two partial results, `finish` turns the joined one into
the numbers above. Their derivative is one line, in `pullback`. With the cotangents `g` of these
numbers, `p = softmax(z)`, `T = sum(t)` and `A = sum(a)`:

    dz = (g_lse + T g_cross + A g_uniform) p - g_cross t - g_uniform a - g_entropy p (log p + H)

and `g_label_logit` more in the label's column. For a one-hot `t` and the loss `cross` alone that is
`p - y`. `T` is not assumed to be 1, as class weights, soft labels and smoothing make it any number.

`lse - z` is found from logits relative to the row's maximum: the difference of two large numbers
would lose the digits that `log p` is made of.

Where a target has `picked` classes, `lse` is that of all other classes, and `picked` holds the
logits of the picked ones. So the probability of the others is a sum, not `1 - sum(p)`, and keeps
its digits where the picked classes have nearly all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Integer

from .dtypes import wide
from .numerics import instantiated, not_negative, product, weighted
from .picked import First, is_label, label_logit, pull_picked

# A field that was not asked for. (`Any`, so that what reads a field it asked for need not test it.)
ABSENT: Any = None
# An `argmax` above every class: the tile does not hold the maximum of the row.
NOWHERE = jnp.iinfo(jnp.int32).max


class Target(NamedTuple):
    """What a row is compared with; each part may be absent.

    Attributes:
      labels: class ids, counted from the first class of the whole row, not of the tile.
      probs: a weight for every class of the tile, instead of `labels`.
      classes: coefficients `a` of the part that is the same for all rows, one per class, or one for
        all classes.
      picked: ids of classes whose logits are wanted, in a target of its own; below 0 is no class.
    """

    labels: Integer[Array, "*rows"] = ABSENT
    probs: Float[Array, "*rows classes"] = ABSENT
    classes: Float[Array, " classes"] | Float[Array, ""] = ABSENT
    picked: Integer[Array, "*rows k"] = ABSENT


class RowStatistics(NamedTuple):
    """The numbers that losses are made of, one each per row; those not asked for are None.

    With `picked`, that and `lse` are relative to the largest logit of the row.
    """

    lse: Float[Array, "*rows"]
    cross: Float[Array, "*rows"] = ABSENT
    label_logit: Float[Array, "*rows"] = ABSENT
    uniform: Float[Array, "*rows"] = ABSENT
    uniform_count: Float[Array, "*rows"] = ABSENT
    entropy: Float[Array, "*rows"] = ABSENT
    argmax: Integer[Array, "*rows"] = ABSENT
    picked: Float[Array, "*rows k"] = ABSENT


class Partial(NamedTuple):
    """The statistics of the softmax over the classes seen so far, and what merges them with others.

    The normaliser is `lse = base + log(sum_exp)`, where `base` is the `finite_maximum` of the row
    and `sum_exp` is `sum exp(z - base)`. `label_logit` is 0 as long as the label was not seen.
    `cross`, `uniform` and `entropy`, which is `<exp(z - base), lse - z>`, are relative to this
    `lse`, but to no less than `base + log 0.7`: `base` may be the maximum of more classes.
    `target_sum`, `classes_sum`, `classes_count` are `sum(t)`, and `sum(a)` and the number of the
    classes with `z > -inf`. `argmax` counts from the first class of the whole row. `picked` is 0 as
    long as the class was not seen, and -inf if there is none.
    """

    base: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    label_logit: Float[Array, "*rows"] = ABSENT
    cross: Float[Array, "*rows"] = ABSENT
    target_sum: Float[Array, "*rows"] = ABSENT
    uniform: Float[Array, "*rows"] = ABSENT
    classes_sum: Float[Array, "*rows"] = ABSENT
    classes_count: Float[Array, "*rows"] = ABSENT
    entropy: Float[Array, "*rows"] = ABSENT
    argmax: Integer[Array, "*rows"] = ABSENT
    picked: Float[Array, "*rows k"] = ABSENT


# The largest logit of each row, and the sum of exponentials relative to it.
Normaliser = tuple[Float[Array, "*rows"], Float[Array, "*rows"]]

# The largest logit of each row in the tiles before, if there are any: a finite number.
Seen = Float[Array, "*rows"] | None


def no_classes(rows: tuple[int, ...], dtype: jnp.dtype) -> Normaliser:
    """The normaliser of no classes: a finite number in place of their maximum, and 0."""
    return jnp.full(rows, jnp.finfo(dtype).min, dtype), jnp.zeros(rows, dtype)


def nothing_seen(
    rows: tuple[int, ...], dtype: jnp.dtype, target: Target, *, entropy: bool, argmax: bool
) -> Partial:
    """The statistics over no classes, with the fields that `read` fills for this target."""
    zero = jnp.zeros(rows, dtype)
    of_probs, of_classes = (ABSENT if x is None else zero for x in (target.probs, target.classes))
    return Partial(
        *no_classes(rows, dtype),
        label_logit=ABSENT if target.labels is None else zero,
        cross=of_probs,
        target_sum=of_probs,
        uniform=of_classes,
        classes_sum=of_classes,
        classes_count=of_classes,
        entropy=zero if entropy else ABSENT,
        argmax=jnp.full(rows, NOWHERE) if argmax else ABSENT,
        picked=ABSENT if target.picked is None else jnp.zeros(target.picked.shape, dtype),
    )


# Adds up arrays over the classes, each by itself; and finds the first class that is marked.
RowSums = Callable[[dict[str, Array]], dict[str, Array]]
FirstOf = Callable[[Bool[Array, "*rows classes"]], Integer[Array, "*rows"]]


def row_maxima(z: Float[Array, "*rows classes"], seen: Seen = None) -> Float[Array, "*rows"]:
    """The `finite_maximum` of each row so far, as a constant: no statistic depends on it."""
    row_max = jax.lax.stop_gradient(jnp.max(z, -1)).astype(wide(z.dtype))
    return finite_maximum(row_max, None if seen is None else jax.lax.stop_gradient(seen))


def sum_exp(
    z: Float[Array, "*rows classes"], row_max: Float[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The sum of exponentials relative to a maximum."""
    return jnp.sum(jnp.exp(shift(z, row_max)), -1)


def normaliser(z: Float[Array, "*rows classes"], seen: Seen = None) -> Normaliser:
    """The `row_maxima`, and the sum of exponentials relative to them."""
    row_max = row_maxima(z, seen)
    return row_max, sum_exp(z, row_max)


def row_sums(summands: dict[str, Array]) -> dict[str, Array]:
    """The sums over the classes."""
    return {name: jnp.sum(x, -1) for name, x in summands.items()}


def first_of(reached: Bool[Array, "*rows classes"]) -> Integer[Array, "*rows"]:
    """The first class for which this is true, or `NOWHERE`."""
    ids = jax.lax.broadcasted_iota(jnp.int32, reached.shape, reached.ndim - 1)
    return jnp.min(jnp.where(reached, ids, NOWHERE), -1)


def read(
    z: Float[Array, "*rows classes"],
    target: Target,
    normaliser: Normaliser,
    row_sums: RowSums = row_sums,
    first_of: FirstOf = first_of,
    *,
    entropy: bool = False,
    argmax: bool = False,
    first_class: First = 0,
) -> Partial:
    """The statistics of one tile, whose first column is class `first_class` of the row.

    `normaliser` is that of the tile, perhaps relative to the maximum of more than that.
    """
    row_max, _ = normaliser
    out = Partial(*normaliser)
    if argmax:
        column = first_of(z.astype(row_max.dtype) == row_max[..., None])
        out = out._replace(argmax=jnp.where(column == NOWHERE, column, column + first_class))
    if target.probs is not None or target.classes is not None or entropy:
        shifted = shift(z, row_max)
        surprise = _log(out.sum_exp)[..., None] - shifted  # that of a class is -log p
        if target.probs is not None:
            probs = target.probs.astype(surprise.dtype)
            cross = product(probs, not_negative(surprise))
            out = out._replace(cross=jnp.sum(cross, -1), target_sum=jnp.sum(probs, -1))
        if target.classes is not None:
            classes, allowed = _spread(target.classes, z)
            sums = {
                "uniform": classes * _finite(not_negative(surprise)),
                "classes_count": allowed.astype(surprise.dtype),
            }
            if target.classes.ndim:
                sums["classes_sum"] = classes
            out = out._replace(**row_sums(sums))
            if not target.classes.ndim:
                out = out._replace(classes_sum=target.classes * out.classes_count)
        if entropy:
            terms = jnp.exp(shifted) * _finite_exponent(surprise)
            out = out._replace(entropy=jnp.sum(terms, -1))
    if target.labels is not None:
        out = out._replace(label_logit=label_logit(z, target.labels, first_class))
    return out


def share_of(part: Partial, scale: Array, row_max: Array, sum_exp: Array) -> Partial:
    """What a part adds to the statistics of a softmax over more classes, given its normaliser.

    `scale` brings the part's exponentials to `row_max`. `ahead` is the difference of the two `lse`:
    in each class `lse - z` grows by it.
    """
    out = part._replace(base=ABSENT, sum_exp=ABSENT, argmax=ABSENT)
    if part.cross is None and part.uniform is None and part.entropy is None:
        return out
    ahead = not_negative(row_max - part.base + _log(sum_exp) - _log(part.sum_exp))
    if part.cross is not None:
        out = out._replace(cross=part.cross + product(part.target_sum, ahead))
    if part.uniform is not None:
        out = out._replace(uniform=part.uniform + part.classes_sum * _finite(ahead))
    if part.entropy is not None:
        more = part.sum_exp * _finite_exponent(ahead)
        out = out._replace(entropy=scale * (part.entropy + more))
    return out


def merge(seen: Partial, new: Partial) -> Partial:
    """Adds the statistics of more classes, which are relative to the maximum of both."""
    row_max, argmax = new.base, ABSENT
    if new.argmax is not None:
        earlier = jnp.where(row_max > seen.base, NOWHERE, seen.argmax)
        argmax = jnp.minimum(earlier, new.argmax)
    scale = jnp.exp(seen.base - row_max)
    sum_exp = seen.sum_exp * scale + new.sum_exp
    share = functools.partial(share_of, row_max=row_max, sum_exp=sum_exp)
    total: Partial = jax.tree.map(jnp.add, share(seen, scale), share(new, jnp.ones_like(scale)))
    return total._replace(base=row_max, sum_exp=sum_exp, argmax=argmax)


def finish(part: Partial) -> RowStatistics:
    """The statistics of a row of which all classes were seen."""
    if part.picked is not None:
        return _finish_picked(part)
    log_sum, base, sum_exp = jnp.log(part.sum_exp), part.base, _nonzero(part.sum_exp)
    out = RowStatistics(
        lse=base + log_sum,
        label_logit=part.label_logit,
        uniform_count=part.classes_count,
        cross=part.cross,
        uniform=part.uniform,
        entropy=part.entropy,
    )
    out = _batched_alike(out, part)
    if part.argmax is not None:
        of_nan = jnp.isnan(part.sum_exp) & (base != jnp.inf)
        out = out._replace(argmax=jnp.where(of_nan | (part.argmax == NOWHERE), 0, part.argmax))
    if part.label_logit is not None:
        out = out._replace(cross=not_negative(log_sum - (out.label_logit - base)))
    if part.entropy is not None:
        out = out._replace(entropy=not_negative(out.entropy / sum_exp))
    return out


def _finish_picked(part: Partial) -> RowStatistics:
    """Either the classes that were picked or the others may be none."""
    highest = jax.lax.stop_gradient(jnp.max(part.picked, -1))
    base = jnp.maximum(part.base, highest)
    rest = part.base - base + _log(part.sum_exp)
    lse = jnp.where(part.sum_exp == 0, -jnp.inf, rest)
    return RowStatistics(lse, picked=part.picked - base[..., None])


def _batched_alike(out: RowStatistics, part: Partial) -> RowStatistics:
    """Adds a zero that depends on the whole target to each statistic.

    Under `vmap` over labels or weights alone, `lse` would be one for the whole batch. JAX from 0.12
    on takes no cotangent of such an output from a custom_vjp, as it could be counted too often.
    (A select of 0 is left out late: the sum of soft labels would be compiled and cost its time.)
    """
    of_target = part.label_logit, part.target_sum, part.classes_sum
    zero = sum(((x != x) & False).astype(x.dtype) for x in of_target if x is not None)
    return jax.tree.map(lambda x: x + zero, out)


def pullback(
    z: Float[Array, "*rows classes"],
    target: Target,
    part: Partial,
    g: RowStatistics,
    *,
    first_class: First = 0,
) -> tuple[Float[Array, "*rows classes"], Target]:
    """Cotangents of a tile and of its target, from those of the statistics of the whole row.

    `part` is that of the whole row. `z - base` and its exponential are written as in `read`, so
    that XLA finds them once where forward and backward are compiled together.
    """
    shifted = shift(z, part.base)
    if target.picked is not None:
        share = g.lse / _nonzero(part.sum_exp)
        dz = pull_picked(shifted, share, target.picked, g.picked, first_class, z.dtype)
        return dz, Target()
    exp, surprise = jnp.exp(shifted), _log(part.sum_exp)[..., None] - shifted
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
        unwanted = (target.probs == 0) & (surprise == jnp.inf)  # nor allowed: 0 times inf is 0
        d_probs = weighted(g.cross[..., None], jnp.where(unwanted, 0, surprise))
        d_target = d_target._replace(probs=d_probs.astype(target.probs.dtype))
    if target.classes is not None:
        classes, allowed = _spread(target.classes, z)
        dz = dz - g.uniform[..., None] * classes
        d_classes = weighted(g.uniform[..., None], jnp.where(allowed, surprise, 0))
        rows = range(z.ndim - target.classes.ndim)
        d_target = d_target._replace(classes=jnp.sum(d_classes, tuple(rows)))
    if g.entropy is not None:
        onto_log_p = (g.entropy / part.sum_exp)[..., None]
        entropy = (part.entropy / part.sum_exp)[..., None]
        dz = dz + exp * onto_log_p * (_finite_exponent(surprise) - entropy)
    return dz, d_target


def cotangents(g: RowStatistics) -> RowStatistics:
    """The cotangents for `pullback`, from a rule that knows which of them are 0.

    If the entropy is not differentiated, its cotangent is None, and nothing is computed for it.
    """
    if isinstance(g.entropy, SymbolicZero):
        g = g._replace(entropy=ABSENT)
    return instantiated(g._replace(argmax=ABSENT))


def finite_maximum(row_max: Float[Array, "*rows"], seen: Seen = None) -> Float[Array, "*rows"]:
    """What is subtracted from a row: its maximum, or a finite number where all of it is -inf."""
    return jnp.maximum(row_max, jnp.finfo(row_max.dtype).min if seen is None else seen)


def shift(
    z: Float[Array, "*rows classes"], row_max: Float[Array, "*rows"]
) -> Float[Array, "*rows classes"]:
    """The tile relative to the maximum of its rows, in the dtype of that."""
    return z.astype(row_max.dtype) - row_max[..., None]


def _log(sum_exp: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jnp.log(_nonzero(sum_exp))


def _nonzero(sum_exp: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The sum, but at least 0.7, as derivatives divide by powers of it.

    It is below 1 only without any class, or if `base` is the maximum of other classes. The bound is
    not 1, the sum of one class: where both are equal, half of the derivative would be lost.
    """
    return jnp.maximum(sum_exp, 0.7)


def _finite_exponent(surprise: Float[Array, "..."]) -> Float[Array, "..."]:
    """The surprise, or a finite number whose probability also rounds to 0."""
    return jnp.minimum(surprise, 1e4)  # with a larger one a derivative of 0 times it would overflow


def _finite(surprise: Float[Array, "..."]) -> Float[Array, "..."]:
    """The surprise, with the largest finite number for inf, to which it may overflow."""
    return jnp.minimum(surprise, jnp.finfo(surprise.dtype).max)


def _spread(
    classes: Float[Array, "..."], z: Float[Array, "*rows classes"]
) -> tuple[Float[Array, "*rows classes"], Bool[Array, "*rows classes"]]:
    """The class coefficients in each row, 0 where a class is not allowed, and which are."""
    allowed = z > -jnp.inf
    return jnp.where(allowed, classes, 0), allowed
