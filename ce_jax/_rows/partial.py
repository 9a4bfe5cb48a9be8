"""What is known of rows of which some classes were read, and what two such parts come to.

Parts are blocks of classes, classes on several devices, or the few numbers that a thread of a GPU
has read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .sums import bounded, finite_exponent, origin

# A field that was not asked for. (`Any`, so that what reads a field it asked for need not test it.)
ABSENT: Any = None
# An `argmax` above every class: the tile does not hold the maximum of the row.
NOWHERE = jnp.iinfo(jnp.int32).max


class Bare(NamedTuple):
    """Sums that are not relative to the label: the cross-entropy is `log1p(rest / own) - gap`.

    `own` is the label's exponential, `rest` the sum of all others and `gap` 0 if exponentials are
    those of the logits as they are; if not, `gap` is the label's logit relative to `base`, `own` is
    1, and `rest` the sum of all exponentials less 1.
    """

    own: Float[Array, "*rows"]
    rest: Float[Array, "*rows"]
    gap: Float[Array, "*rows"]


class Attempt(NamedTuple):
    """The exponentials in memory: of `z - tried`, or of `z` as it is, and where that did not do.

    Bit k of `missed` is set for block k of the first axis. One of `tried` and `bare` is there.
    """

    tried: Float[Array, "*rows"] | None
    missed: Integer[Array, ""]
    bare: Bare | None = None


class Partial(NamedTuple):
    """Sums over the classes seen so far, relative to one number for each row.

    That is `base`, the largest logit seen so far or, in rows that are read at once, the label's or
    0 (see `from_label`). With `d_c = z_c - base` (or `z_c` where that is -inf): `sum_exp` is
    `sum exp(d)`; `label_logit` is the label's `z` itself, 0 as long as it was not seen;
    `target_dot`, `target_sum` are `<t, d>`, `sum(t)`; `classes_dot`, `classes_sum`,
    `classes_count` are `<a, d>`, `sum(a)` and the number of the classes with `z > -inf`;
    `exp_dot` is `<exp(d), d>`; `argmax` counts from the first class of the whole row. `attempt`
    is there where the pull-back is to take `exp(d)` from `_platform.from_label`.
    """

    base: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    label_logit: Float[Array, "*rows"] = ABSENT
    target_dot: Float[Array, "*rows"] = ABSENT
    target_sum: Float[Array, "*rows"] = ABSENT
    classes_dot: Float[Array, "*rows"] = ABSENT
    classes_sum: Float[Array, "*rows"] = ABSENT
    classes_count: Float[Array, "*rows"] = ABSENT
    exp_dot: Float[Array, "*rows"] = ABSENT
    argmax: Integer[Array, "*rows"] = ABSENT
    attempt: Attempt = ABSENT


def rebase(part: Partial, row_max: Float[Array, "*rows"]) -> Partial:
    """The same sums relative to another maximum; `base` and `argmax` stay what they were."""
    move = origin(part.base) - origin(row_max)
    scale = jnp.where(part.base == -jnp.inf, 0, jnp.exp(move))  # nothing seen: exp may overflow
    out = part._replace(sum_exp=part.sum_exp * scale)
    # Where the move overflows, 0 times it is 0, as in the sums.
    if part.target_dot is not None:
        finite = jnp.where(part.target_sum == 0, bounded(move), move)
        out = out._replace(target_dot=part.target_dot + part.target_sum * finite)
    if part.classes_dot is not None:
        out = out._replace(classes_dot=part.classes_dot + part.classes_sum * bounded(move))
    if part.exp_dot is not None:
        dot = part.exp_dot + part.sum_exp * finite_exponent(move)
        out = out._replace(exp_dot=dot * scale)
    return out


def merge(a: Partial, b: Partial) -> Partial:
    """Joins the statistics of two disjoint sets of classes."""
    row_max = jnp.maximum(a.base, b.base)
    argmax = ABSENT
    if a.argmax is not None:
        of_equals = jnp.where(a.base == b.base, jnp.minimum(a.argmax, b.argmax), a.argmax)
        argmax = jnp.where(b.base > a.base, b.argmax, of_equals)
    sums = (rebase(x, row_max)._replace(argmax=ABSENT) for x in (a, b))
    total: Partial = jax.tree.map(jnp.add, *sums)
    return total._replace(base=row_max, argmax=argmax)
