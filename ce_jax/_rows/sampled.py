"""Logits of the label and of sampled classes: checks, masks, and the linear layer.

Of the layer's kernel only the rows of these classes are read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._arguments import checks, options, reductions
from .._arguments.types import ArrayLike
from . import sharded
from .bins import number_of_run
from .dtypes import wide
from .head import Head, Tokens, logits, with_slope_of


class Compared(NamedTuple):
    """Logits in the dtype of the loss, with harmless values where they do not count.

    Attributes:
      label: of the label.
      negatives: of the negatives.
      counts: which rows count; None if nothing excludes any.
      included: which negatives do; None if nothing excludes any.
      weights: sample weights; None if there are none.
    """

    label: Float[Array, "*rows"]
    negatives: Float[Array, "*rows samples"]
    counts: Bool[Array, "*rows"] | None
    included: Bool[Array, "*rows samples"] | None
    weights: Float[Array, "*rows"] | None


def compared(
    label_logits: ArrayLike,
    negative_logits: ArrayLike,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
) -> Compared:
    """Checks the logits and what to include: the number of dimensions of `where` decides."""
    label = checks.floating("label_logits", label_logits)
    negatives = checks.floating("negative_logits", negative_logits)
    if negatives.ndim != label.ndim + 1 or negatives.shape[:-1] != label.shape:
        raise ValueError(
            f"negative_logits must have the shape of label_logits, {label.shape}, and one axis "
            f"more, of the negatives; got {negatives.shape}"
        )
    dtype = wide(label.dtype, negatives.dtype)
    label, negatives = label.astype(dtype), negatives.astype(dtype)
    counts = included = None
    if where is not None:
        where = checks.boolean("where", where)
        if where.ndim == negatives.ndim:
            included = checks.of_rows("where", where, negatives.shape, "negative_logits")
            negatives = jnp.where(included, negatives, 0)
        else:
            shape = negatives.shape
            counts = checks.rows_to_include(where, label.shape, "negative_logits", shape)
    weights = reductions.weights("sample_weight", sample_weight, label.shape, dtype)
    kept = counts
    if weights is not None:
        # A weight of 0 silences NaN; where there is none, its derivative is the loss. The
        # difference of two scores of -inf is one.
        meets = (label == -jnp.inf) & jnp.any(negatives == -jnp.inf, -1)
        heard = (weights != 0) | (label < jnp.inf) & jnp.all(negatives < jnp.inf, -1) & ~meets
        kept = heard if counts is None else counts & heard
    if kept is not None:
        label = jnp.where(kept, label, 0)
        negatives = jnp.where(kept[..., None], negatives, 0)
    return Compared(label, negatives, counts, included, weights)


def tempered(x: Compared, temperature: Array | None) -> Compared:
    """All logits of a row over its temperature."""
    return x._replace(
        label=options.tempered_elements(x.label, temperature, x.counts),
        negatives=options.tempered_rows(x.negatives, temperature, x.counts),
    )


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
    """The same; what belongs to one class adds up in a wide copy, which nothing else reads."""
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
