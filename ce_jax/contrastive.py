r"""Contrastive losses: tell the pairs that belong together from all others in the batch.

The matrix of the logits of all pairs is never held, but computed in blocks, and computed again for
the gradient. With `axis_name`, inside `jax.shard_map`, the batch is sharded over a mesh axis: each
device compares its own rows with the columns of all, which it gathers once. Gathering rather than
passing the columns on from device to device costs `[N, D]` of memory, little beside a block of
logits, for one collective that the derivative turns into one too.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from ._arguments import checks, reductions
from ._arguments.sides import over_devices, reduced, sides
from ._rows import pairs
from ._rows.numerics import scalar
from ._rows.tile import wide
from .linear import linear_softmax_cross_entropy

_STATIC = ("axis_name", "reduction", "memory_budget", "forward_mode")


def info_nce_loss(
    queries: Shaped[ArrayLike, "..."],
    keys: Shaped[ArrayLike, "..."],
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    logit_scale: Shaped[ArrayLike, ""] = 1.0,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    axis_name: str | None = None,
    reduction: str = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    r"""Cross-entropy of picking each query's own key out of all keys of the batch.

    .. math::
      \ell_i = \log \sum_j e^{z_{ij}} - z_{ii}, \qquad z_{ij} = s \langle q_i, k_j \rangle

    It is `linear_softmax_cross_entropy` with the keys as kernel, and neither holds the logits.
    Normalise the embeddings where the cosine is wanted. A temperature is :math:`1 / s`.

    Args:
      queries: embeddings `[N, D]`, floating.
      keys: embeddings `[M, D]` of the same dtype, M at least N: key i belongs to query i, those
        beyond N, such as hard negatives or a queue of earlier keys, to none.
      where: bool `[N]`: the pairs that exist. Others count neither as query nor as key.
      logit_scale: s, at least 0. May be traced, and learnt: as :math:`s = e^t`, say.
      sample_weight: weight of each query's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `queries`, `keys`, `where`
        and `sample_weight` are sharded by rows. All devices' keys are compared with.
      reduction: "none": this device's losses `[N]`; "sum" or "mean": over all devices, the latter
        divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default as in
        `linear_softmax_cross_entropy`.
      forward_mode: let JAX derive the derivative, so that forward mode works.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that JAX does not
        see vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> queries, keys = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
      >>> print(ce_jax.info_nce_loss(queries, keys, logit_scale=10.0).round(4))
      [0.0182 0.0003]

    References:
      van den Oord et al., `Representation Learning with Contrastive Predictive Coding`, 2018;
      Sohn, `Improved Deep Metric Learning with Multi-class N-pair Loss Objective`, 2016. More
      keys than queries: He et al., `Momentum Contrast`, 2020.
    """
    checks.reduction(reduction)
    return _info_nce(
        queries,
        keys,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        sample_weight,
        axis_name=axis_name,
        reduction=reduction,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def _info_nce(
    queries: ArrayLike,
    keys: ArrayLike,
    where: ArrayLike | None,
    logit_scale: Array,
    sample_weight: ArrayLike | None,
    *,
    axis_name: str | None,
    reduction: str,
    memory_budget: int | None,
    forward_mode: bool,
) -> Array:
    x = sides("queries", queries, "keys", keys, where, logit_scale, axis_name, more=True)
    rows, dtype = x.rows.shape[0], wide(x.rows.dtype)
    bias = None
    if x.column_counts is not None:
        bias = jnp.where(x.column_counts, 0, -jnp.inf).astype(x.rows.dtype)
    if rows == 0:  # perhaps there is no key either
        loss = jnp.sum(x.rows, -1 if reduction == "none" else None, dtype=dtype)
    else:
        found = linear_softmax_cross_entropy(
            x.rows,
            x.columns,
            x.first + jnp.arange(rows, dtype=jnp.int32),
            class_axis=0,
            bias=bias,
            sample_weight=sample_weight,
            where=x.row_counts,
            reduction="none" if reduction == "none" else "sum",
            memory_budget=memory_budget,
            forward_mode=forward_mode,
        )
        loss = cast(Array, found)  # no tuple, as statistics were not asked for
    if reduction == "none":
        return loss
    weights = reductions.weights("sample_weight", sample_weight, (rows,), dtype)
    return over_devices(loss, (rows,), x.row_counts, weights, axis_name, reduction)


def clip_loss(
    images: Shaped[ArrayLike, "..."],
    texts: Shaped[ArrayLike, "..."],
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    logit_scale: Shaped[ArrayLike, ""] = 1.0,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    axis_name: str | None = None,
    reduction: str = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    r"""Mean of the cross-entropies of finding the text of an image and the image of a text.

    .. math::
      \ell_i = \tfrac{1}{2} \Big( \log \sum_j e^{z_{ij}} - z_{ii} \Big)
        + \tfrac{1}{2} \Big( \log \sum_j e^{z_{ji}} - z_{ii} \Big),
      \qquad z_{ij} = s \langle a_i, b_j \rangle

    `info_nce_loss` in both directions, but each block of logits is computed once for both, and
    once more for the gradient. Normalise the embeddings: :math:`z_{ij}` is then s times a cosine.

    Args:
      images: embeddings `[N, D]` of one modality, floating.
      texts: embeddings `[N, D]` of the other, of the same dtype.
      where: bool `[N]`: the pairs that exist. Others have no part in anything.
      logit_scale: s, at least 0, the inverse of the temperature. May be traced, and learnt: CLIP
        learns t in :math:`s = e^t` from :math:`1 / 0.07` on, and bounds s by 100.
      sample_weight: weight of each pair, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `images`, `texts`, `where`
        and `sample_weight` are sharded by rows. Pairs are told from those of all devices.
      reduction: "none": this device's losses `[N]`; "sum" or "mean": over all devices, the latter
        divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: let JAX derive the derivative, so that forward mode works.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that JAX does not
        see vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> print(ce_jax.clip_loss(images, texts, logit_scale=10.0).round(4))
      [0.0091 0.0636]

    References:
      Radford et al., `Learning Transferable Visual Models From Natural Language Supervision`,
      2021; Zhang et al., `Contrastive Learning of Medical Visual Representations from Paired
      Images and Text`, 2020.
    """
    checks.reduction(reduction)
    return _clip(
        images,
        texts,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        sample_weight,
        axis_name=axis_name,
        reduction=reduction,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def _clip(
    images: ArrayLike,
    texts: ArrayLike,
    where: ArrayLike | None,
    logit_scale: Array,
    sample_weight: ArrayLike | None,
    *,
    axis_name: str | None,
    reduction: str,
    memory_budget: int | None,
    forward_mode: bool,
) -> Array:
    x = sides("images", images, "texts", texts, where, logit_scale, axis_name)
    by_image, by_text = pairs.both_directions(
        x, axis_name=axis_name, memory_budget=memory_budget, forward_mode=forward_mode
    )
    own = jax.lax.dynamic_slice_in_dim(by_text, x.first, x.rows.shape[0])
    return reduced((by_image + own) / 2, x.row_counts, sample_weight, axis_name, reduction)


def siglip_loss(
    images: Shaped[ArrayLike, "..."],
    texts: Shaped[ArrayLike, "..."],
    where: Shaped[ArrayLike, "..."] | None = None,
    *,
    logit_scale: Shaped[ArrayLike, ""] = 1.0,
    logit_bias: Shaped[ArrayLike, ""] = 0.0,
    sample_weight: Shaped[ArrayLike, "..."] | None = None,
    axis_name: str | None = None,
    reduction: str = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    r"""Binary cross-entropy of telling, for each image and text by itself, if they are a pair.

    .. math::
      \ell_i = \log(1 + e^{-z_{ii}}) + \sum_{j \ne i} \log(1 + e^{z_{ij}}),
      \qquad z_{ij} = s \langle a_i, b_j \rangle + b

    Each pair is judged by itself, so there is no normaliser over the batch. Normalise the
    embeddings: :math:`z_{ij}` is then s times a cosine, plus b.

    Args:
      images: embeddings `[N, D]` of one modality, floating.
      texts: embeddings `[N, D]` of the other, of the same dtype.
      where: bool `[N]`: the pairs that exist. Others have no part in anything.
      logit_scale: s, at least 0. May be traced, and learnt: the paper learns t in
        :math:`s = e^t` from 10 on.
      logit_bias: b, which makes up for so many more negatives than positives. May be traced, and
        learnt: the paper does from -10 on.
      sample_weight: weight of each image's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `images`, `texts`, `where`
        and `sample_weight` are sharded by rows. Images are paired with the texts of all devices.
      reduction: "none": this device's losses `[N]`; "sum" or "mean": over all devices, the latter
        divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: let JAX derive the derivative, so that forward mode works.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that JAX does not
        see vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> print(ce_jax.siglip_loss(images, texts, logit_scale=10.0, logit_bias=-5.0))
      [1.32   0.0553]

    References:
      Zhai et al., `Sigmoid Loss for Language Image Pre-Training`, 2023.
    """
    checks.reduction(reduction)
    return _siglip(
        images,
        texts,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        scalar("logit_bias", logit_bias),
        sample_weight,
        axis_name=axis_name,
        reduction=reduction,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def _siglip(
    images: ArrayLike,
    texts: ArrayLike,
    where: ArrayLike | None,
    logit_scale: Array,
    logit_bias: Array,
    sample_weight: ArrayLike | None,
    *,
    axis_name: str | None,
    reduction: str,
    memory_budget: int | None,
    forward_mode: bool,
) -> Array:
    x = sides("images", images, "texts", texts, where, logit_scale, axis_name)
    bias = logit_bias.astype(wide(x.rows.dtype))
    loss = pairs.decisions(x, bias, memory_budget=memory_budget, forward_mode=forward_mode)
    return reduced(loss, x.row_counts, sample_weight, axis_name, reduction)
