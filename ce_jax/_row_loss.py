"""The loss of a row from its statistics. Plain functions: JAX differentiates them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from . import _sharded
from ._tile import RowStatistics


def softmax_loss(
    statistics: RowStatistics,
    label_weight: Float[Array, "*rows"] | None = None,
    label_smoothing: ArrayLike | None = None,
    z_loss: ArrayLike | None = None,
    *,
    classes: int,
) -> Float[Array, "*rows"]:
    """`(1 - eps) w_y cross + eps C / K uniform + z_loss lse**2`, `K` of `C` classes being allowed.

    With `cross = lse - z_y` and `uniform = sum_c (w_c / C) (lse - z_c)` this is the cross-entropy
    of the weighted and smoothed target `t`, `T lse - <t, z>`, written without building `t`.
    """
    loss = statistics.cross
    dtype = loss.dtype
    if label_weight is not None:
        loss = weighted(label_weight, loss)
    if label_smoothing is not None:
        eps = jnp.asarray(label_smoothing, dtype)
        loss = weighted(1 - eps, loss)
        loss = loss + eps * (classes / statistics.uniform_count) * statistics.uniform
    if z_loss is not None:
        loss = loss + jnp.asarray(z_loss, dtype) * statistics.lse * statistics.lse
    return loss


def weighted(weight: Float[Array, "..."], loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """`weight * loss`, where a weight of 0 also silences a loss of inf or NaN."""
    silent = (weight == 0) & ~jnp.isfinite(loss)
    return weight * jnp.where(silent, 0, loss)


def smoothing_coefficients(
    weight: Float[Array, " local"] | None, classes: int, dtype: DTypeLike
) -> Float[Array, " local"] | Float[Array, ""]:
    """`w / C` for the local ones of `C` classes: a mean where a sum of huge logits overflows."""
    return jnp.asarray(1 / classes, dtype) if weight is None else weight / classes


def opened(
    function: Callable[[Array], Array], one: Array
) -> tuple[Callable[..., Array], list[Any]]:
    """The function with the traced floats of its closure as arguments, and these floats.

    So they get gradients. What the closure holds varies over the mesh axes over which the
    log-probabilities do.
    """
    program = jax.make_jaxpr(function)(one)
    traced = [
        isinstance(c, jax.core.Tracer) and jnp.issubdtype(c.dtype, jnp.floating)
        for c in program.consts
    ]

    def of_row(log_prob: Array, *arguments: Array) -> Array:
        given = iter(arguments)
        held = zip(traced, program.consts, strict=True)
        constants = [next(given) if is_traced else jnp.asarray(c) for is_traced, c in held]
        (loss,) = jax.core.eval_jaxpr(program.jaxpr, _sharded.like(constants, log_prob), log_prob)
        return loss

    return of_row, [c for is_traced, c in zip(traced, program.consts, strict=True) if is_traced]
