"""Row statistics when the classes are spread over the devices of a mesh axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from . import _tile


def first_class(local_classes: int, axis_name: str | None) -> int | Integer[Array, ""]:
    """The id of this device's first class; devices hold consecutive ranges of equal size."""
    if axis_name is None:
        return 0
    return jax.lax.axis_index(axis_name) * local_classes


def merge_across(part: _tile.Partial, axis_name: str | None) -> _tile.Partial:
    """Merges the statistics of all devices of `axis_name`: one maximum, one sum of [rows] each."""
    if axis_name is None:
        return part
    row_max = jax.lax.pmax(part.max, axis_name)
    argmax = part.argmax
    if argmax is not None:
        # The lowest class among those that reach the maximum, as `jnp.argmax` has it.
        candidate = jnp.where(part.max == row_max, argmax, jnp.iinfo(argmax.dtype).max)
        argmax = jax.lax.pmin(candidate, axis_name)
    sums = _tile.rebase(part, row_max)._replace(max=_tile.ABSENT, argmax=_tile.ABSENT)
    total: _tile.Partial = jax.lax.psum(sums, axis_name)
    return total._replace(max=row_max, argmax=argmax)


def take_class(
    per_class: Float[Array, " classes"], ids: Integer[Array, "*rows"], axis_name: str | None
) -> Float[Array, "*rows"]:
    """`per_class[ids]`, with `per_class` sharded like the classes."""
    if axis_name is None:
        return per_class[ids]
    local = ids - first_class(per_class.shape[0], axis_name)
    inside = (local >= 0) & (local < per_class.shape[0])
    return jax.lax.psum(jnp.where(inside, per_class[jnp.where(inside, local, 0)], 0), axis_name)


def all_classes(local_classes: int, axis_name: str | None) -> int:
    """The number of classes of a whole row."""
    return local_classes if axis_name is None else local_classes * jax.lax.axis_size(axis_name)


def sum_over(x: Float[Array, "*rows"], axis_name: str | None) -> Float[Array, "*rows"]:
    """The sum over the devices of the class axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def max_over(x: Float[Array, "*rows"], axis_name: str | None) -> Float[Array, "*rows"]:
    """The maximum over the devices of the class axis, as a constant."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmax(x, axis_name)
