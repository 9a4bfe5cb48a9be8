"""The squared distance between a softmax and its one-hot label.

With `p = softmax(z)`, the label's class `y`, `m = sum_{c != y} p_c`, which is `1 - p_y`, and
`s = sum_{c != y} p_c^2`, the distance `d` and its derivatives are

    d = s + m^2        dd / dz_c = 2 p_c (p_c + p_y m - s)        dd / dz_y = -2 p_y d

Sums over the other classes keep their digits where the label has nearly all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .. import _platform
from .picked import is_label, label_logit
from .tile import row_maxima, shift


class _Row(NamedTuple):
    """The largest logit, the sum of exponentials relative to it, and p_y, m and s."""

    row_max: Float[Array, "*rows"]
    sum_exp: Float[Array, "*rows"]
    of_label: Float[Array, "*rows"]
    missed: Float[Array, "*rows"]
    squares: Float[Array, "*rows"]

    @property
    def distance(self) -> Float[Array, "*rows"]:
        """`s + m^2`."""
        return self.squares + jnp.square(self.missed)


@jax.custom_jvp
def squared_distance(
    z: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The distance of each row, in [0, 2]; each label must be in [0, C)."""
    return _read(z, labels).distance


@squared_distance.defjvp
def _squared_distance_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, labels), (d_z, _) = primals, tangents
    row = _read(z, labels)
    p = jnp.exp(shift(z, row.row_max)) * (1 / row.sum_exp)[..., None]
    of_others = p + (row.of_label * row.missed - row.squares)[..., None]
    slope = 2 * p * jnp.where(is_label(labels, z), -row.distance[..., None], of_others)
    return squared_distance(z, labels), jnp.sum(slope * d_z.astype(p.dtype), -1)


def _read(z: Float[Array, "*rows classes"], labels: Integer[Array, "*rows"]) -> _Row:
    row_max = row_maxima(z)
    others = jnp.where(is_label(labels, z), 0, jnp.exp(shift(z, row_max)))
    of_others, of_squares = _platform.two_sums(others, jnp.square(others))
    of_label = jnp.exp(label_logit(z, labels) - row_max)
    total = of_others + of_label
    squares = of_squares / jnp.square(total)
    return _Row(row_max, total, of_label / total, of_others / total, squares)
