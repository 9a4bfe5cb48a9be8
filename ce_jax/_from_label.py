"""Exponentials relative to the logit of the row's label, so that a CPU needs no row's maximum.

With `z_y` in place of the maximum, `sum_c exp(z_c - z_y)` is `1 / p_y`. It is at least 1, the
label's own share, so no class that matters underflows, and its logarithm is the cross-entropy, with
all the digits that it has relative to the maximum. It grows with the loss, and with it the
differences `z_c - z_y`, which float32 rounds by half of 2e-6 above 16. So where the loss of any row
exceeds 32 nats, and where a logit is infinite or NaN in a way that matters, the whole batch is read
again relative to its maxima.

That takes one pass over the logits of five: on two cores 0.75 of the time for value and gradient.
Off the CPU XLA reads a row once for its maximum and its sum, and nothing would be gained.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._parts import Shapes, row_maxima
from ._sums import origin, shift, sum_exp

# Sums above this are of losses above 31.9 nats.
_MOST = 2.0**46


class Found(NamedTuple):
    """The sum of exponentials of each row.

    Attributes:
      base: the logit of each row that its sum is relative to: the label's, or the largest.
      sum_exp: the sum.
      near: whether the labels' served in all rows.
    """

    base: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    near: Bool[Array, ""]


def sums(
    z: Float[Array, "*rows classes"],
    label_logit: Float[Array, "*rows"],
    *,
    shapes: Shapes,
    shared: bool,
) -> Found:
    """The sum of exponentials of each row.

    Args:
      z: the tile, in which rows are whole.
      label_logit: the logit of each row's label, in the dtype of the sums.
      shapes: those of `_parts.best_shapes`.
      shared: whether `exponentials` will be asked for in the same program. They are found along
        whole rows, and so the sums then are too.
    """
    by_label = functools.partial(_by_label, {} if shared else shapes, shapes)
    found: Found = jax.lax.platform_dependent(
        z,
        jax.lax.stop_gradient(label_logit),
        cpu=by_label,
        default=functools.partial(_by_maximum, shapes),
    )
    return found


def exponentials(
    z: Float[Array, "*rows classes"],
    label_logit: Float[Array, "*rows"],
    base: Float[Array, "*rows"],
    near: Bool[Array, ""],
) -> Float[Array, "*rows classes"]:
    """`exp(z - base)`, which a CPU has computed already if the labels' logits served."""

    def by_base(z: Array, _: Array, base: Array, __: Array) -> Array:
        return jnp.exp(shift(z, origin(base)))

    exp: Array = jax.lax.platform_dependent(
        z,
        jax.lax.stop_gradient(label_logit),
        base,
        near,
        cpu=_exp_by_label,
        default=by_base,
    )
    return exp


def _by_maximum(shapes: Shapes, z: Array, label_logit: Array) -> Found:
    # The sums' logarithm plus the maximum does not depend on the maximum, so its derivative is left
    # out of forward mode and of second derivatives.
    row_max = jax.lax.stop_gradient(row_maxima(z, shapes)).astype(label_logit.dtype)
    total = sum_exp(shapes, z, origin(row_max), stored=False)
    # Like a number found in the rows, it varies over the mesh axes that they vary over.
    near = jnp.full_like(jnp.max(total, initial=0), False, dtype=bool)
    return Found(row_max, total, near)


# A loop of one turn or none stands for `lax.cond`. XLA keeps what it starts from in the memory of
# the result, where a branch that hands it on would copy; and under `vmap` there is a turn only if
# some of the batch needs one, where both branches would always be computed.


def _finite(label_logit: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    # Beside a label at -inf the sum becomes infinite, unless all of the row is at -inf.
    return jnp.maximum(label_logit, jnp.finfo(label_logit.dtype).min)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _by_label(shapes: Shapes, shapes_by_maximum: Shapes, z: Array, label_logit: Array) -> Found:
    total = sum_exp(shapes, z, _finite(label_logit))
    near = jnp.max(total, initial=0) < _MOST

    def again(found: Found) -> Found:
        by_maximum = _by_maximum(shapes_by_maximum, z, label_logit)
        return by_maximum._replace(near=found.near | True)

    first = Found(label_logit, total, near)
    return jax.lax.while_loop(lambda found: ~found.near, again, first)._replace(near=near)


@_by_label.defjvp
def _by_label_jvp(
    shapes: Shapes,
    shapes_by_maximum: Shapes,
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Found, Found]:
    (z, label_logit), (dz, _) = primals, tangents
    found = _by_label(shapes, shapes_by_maximum, z, label_logit)
    _, slope = jax.jvp(lambda z: sum_exp(shapes, z, origin(found.base)), (z,), (dz,))
    unmoved = np.zeros(found.near.shape, jax.dtypes.float0)
    return found, Found(jnp.zeros_like(found.base), slope, unmoved)


@jax.custom_jvp
def _exp_by_label(z: Array, label_logit: Array, base: Array, near: Array) -> Array:
    def again(found: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.exp(shift(z, origin(base))), found[1] | True

    # Written as in the sums, which XLA then takes it from.
    first = jnp.exp(shift(z, _finite(label_logit))), near
    return jax.lax.while_loop(lambda found: ~found[1], again, first)[0]


@_exp_by_label.defjvp
def _exp_by_label_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    z, _, base, _ = primals
    exp = _exp_by_label(*primals)
    _, shifts = jax.jvp(
        lambda z, base: shift(z, origin(base)), (z, base), (tangents[0], tangents[2])
    )
    return exp, exp * shifts
