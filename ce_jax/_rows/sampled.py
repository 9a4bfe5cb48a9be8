"""A linear layer's logits of the label and of sampled classes.

Of the kernel only the rows of these classes are read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from . import sharded
from .bins import number_of_run
from .blocks import with_slope_of
from .dtypes import wide
from .head import Head, Tokens, logits


def layer_logits(
    hidden: Float[Array, "n width"],
    head: Head,
    labels: Integer[Array, " n"],
    ids: Integer[Array, "*n samples"],
    class_axis: int,
    *,
    forward_mode: bool,
) -> tuple[Float[Array, " n"], Float[Array, "n samples"]]:
    """Logits of the labels, and of the classes `ids`, the same for all rows or each row's own."""
    hidden, head, labels, ids = sharded.align((hidden, head, labels, ids))
    rows_of = _differentiated_by_jax if forward_mode else _rows_of_kernel
    logits_of = _plain_logits if forward_mode else _fused_logits
    # One read and, for the gradient, one write of the kernel's rows.
    both = jnp.concatenate([labels, ids.ravel()])
    part = Head(rows_of(class_axis, head.kernel, both))
    if head.bias is not None:
        part = part._replace(bias=rows_of(0, head.bias[:, None], both)[:, 0])

    def of_row(h: Array, row: Head) -> Array:
        return logits_of(h[None], row._replace(soft_cap=head.soft_cap))[0]

    n = labels.shape[0]
    own = jax.vmap(of_row)(hidden, jax.tree.map(lambda x: x[:n, None], part))[:, 0]
    negatives = jax.tree.map(lambda x: x[n:].reshape(*ids.shape, *x.shape[1:]), part)
    if ids.ndim == 1:
        return own, logits_of(hidden, negatives._replace(soft_cap=head.soft_cap))
    return own, jax.vmap(of_row)(hidden, negatives)


def _plain_logits(hidden: Float[Array, "n width"], head: Head) -> Float[Array, "n samples"]:
    return logits(Tokens(hidden), head, 0)[0]


_fused_logits = jax.custom_vjp(_plain_logits)
_Residuals = tuple[ArrayLike, ArrayLike]


def _logits_fwd(hidden: Array, head: Head) -> tuple[Array, tuple[Array, Head]]:
    return _plain_logits(hidden, head), (hidden, head)


def _logits_bwd(residuals: tuple[ArrayLike, Head], g: Array) -> tuple[Array, Head]:
    hidden, head = jax.tree.map(jnp.asarray, residuals)  # what is constant may come as a literal
    _, pull = logits(Tokens(hidden), head, 0)
    d_tokens, d_head = pull(g)
    return jax.tree.map(lambda x, d: d.astype(x.dtype), (hidden, head), (d_tokens.hidden, d_head))


_fused_logits.defvjp(_logits_fwd, _logits_bwd)


def _gather(
    class_axis: int, kernel: Float[Array, "_ _"], ids: Integer[Array, " n"]
) -> Float[Array, "n width"]:
    rows = jnp.take(kernel, ids, axis=class_axis, mode="clip")
    return rows if class_axis == 0 else rows.T


def _differentiated_by_jax(
    class_axis: int, kernel: Float[Array, "_ _"], ids: Integer[Array, " n"]
) -> Float[Array, "n width"]:
    """As `_gather`; cotangents of one class add up in a wide copy, which nothing else reads."""
    if kernel.dtype == wide(kernel.dtype):
        return _gather(class_axis, kernel, ids)
    copy = _gather(class_axis, kernel.astype(wide(kernel.dtype)), ids)
    return with_slope_of(copy, _gather(class_axis, jax.lax.stop_gradient(kernel), ids))


_rows_of_kernel = jax.custom_vjp(_gather, nondiff_argnums=(0,))


def _rows_fwd(class_axis: int, kernel: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gather(class_axis, kernel, ids), (kernel, ids)


def _rows_bwd(class_axis: int, residuals: _Residuals, g: Array) -> tuple[Array, None]:
    """What belongs to one class adds up in the wide dtype, at the size of the sample."""
    kernel, ids = map(jnp.asarray, residuals)  # what is constant may come as a literal
    zeros, nobody = jnp.zeros_like(kernel), kernel.shape[class_axis]
    order = jnp.argsort(ids)
    ids, g = ids[order], g[order]
    entry = number_of_run(ids)
    classes = jnp.full_like(ids, nobody).at[entry].set(ids)
    sums = jnp.zeros(g.shape, wide(g.dtype)).at[entry].add(g.astype(wide(g.dtype)))
    sums = sums.astype(kernel.dtype)
    if class_axis == 0:
        return zeros.at[classes].set(sums, mode="drop"), None
    return zeros.at[:, classes].set(sums.T, mode="drop"), None


_rows_of_kernel.defvjp(_rows_fwd, _rows_bwd)
