r"""Contrastive losses: tell the pairs that belong together from all others in the batch.

The matrix of the logits of all pairs is never held, but computed in blocks, and computed again for
the gradient; in one block where `jax.export` leaves the size of the batch open. With `axis_name`,
inside `jax.shard_map`, the batch is sharded over a mesh axis: each device compares its own rows
with the columns of all, which it gathers once. Gathering rather than passing the columns on from
device to device costs `[N, D]` of memory, little beside a block of logits, for one collective that
the derivative turns into one too.

The scale multiplies the products of the embeddings, which are float32 for narrower embeddings too:
an embedding times a scale, rounded, would cost a bfloat16 loss its second digit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from ._arguments import checks, reductions
from ._arguments.compiled import compiled
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.sides import reduced, sides, without_silent
from ._arguments.types import ArrayLike, Loss, Reduction, Scalar, reducible, with_statistics
from ._rows import pairs
from ._rows.tile import wide


@reducible
def info_nce_loss(
    queries: ArrayLike,
    keys: ArrayLike,
    where: ArrayLike | None = None,
    *,
    logit_scale: Scalar = 1.0,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Cross-entropy of picking each query's own key out of all keys of the batch.

    .. math::
      \ell_i = \log \sum_j e^{z_{ij}} - z_{ii}, \qquad z_{ij} = s \langle q_i, k_j \rangle

    It is the cross-entropy of a linear layer with the keys as kernel. Normalise the embeddings
    where the cosine is wanted. A temperature is :math:`1 / s`.

    Args:
      queries: embeddings `[N, D]`, floating.
      keys: embeddings `[M, D]` of the same dtype, M at least N: key i belongs to query i, those
        beyond N, such as hard negatives or a queue of earlier keys, to none.
      where: bool `[N]`: the pairs that exist. Others count neither as query nor as key.
      logit_scale: s, at least 0. May be traced, and learnt: as :math:`s = e^t`, say.
      sample_weight: weight of each query's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `queries`, `keys`, `where`
        and `sample_weight` are sharded by rows. All devices' keys are compared with.
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `keys`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: needed by `jax.jvp`, `jax.jacfwd` and `jax.linearize`: the derivative is then
        JAX's own.

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
    return _info_nce(
        queries,
        keys,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        sample_weight,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _info_nce(
    queries: Array,
    keys: Array,
    where: Array | None,
    logit_scale: Array,
    sample_weight: Array | None,
    *,
    axis_name: str | None,
    reduction: Reducer,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss:
    x = sides("queries", queries, "keys", keys, where, logit_scale, axis_name, more=True)
    x = without_silent(x, sample_weight)
    loss = pairs.one_direction(x, memory_budget=memory_budget, forward_mode=forward_mode)
    return reduced(loss, x.row_counts, sample_weight, axis_name, reduction)


class ClipStatistics(NamedTuple):
    """What each image and each text of a batch is taken for; see `clip_loss`.

    Both are ids among the pairs of all devices, so that the right one of pair i is i, and on device
    k of a mesh axis, which holds N pairs, k N + i.

    Attributes:
      text_of_image: the text with the largest logit, the first of several.
      image_of_text: the image with the largest logit, the first of several.
    """

    text_of_image: Integer[Array, " n"]
    image_of_text: Integer[Array, " n"]


@with_statistics
def clip_loss(
    images: ArrayLike,
    texts: ArrayLike,
    where: ArrayLike | None = None,
    *,
    logit_scale: Scalar = 1.0,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    return_statistics: bool = False,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss | tuple[Loss, ClipStatistics]:
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
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      return_statistics: return also, from the same pass, which text each image is taken for, and
        which image each text.
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: needed by `jax.jvp`, `jax.jacfwd` and `jax.linearize`: the derivative is then
        JAX's own.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings). With
      `return_statistics`, a tuple of the loss and a `ClipStatistics` of int32 arrays `[N]`: ids
      among the pairs of all devices, the first of the largest logits. A pair that does not exist
      has 0.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that JAX does not
        see vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> print(ce_jax.clip_loss(images, texts, logit_scale=10.0).round(4))
      [0.0091 0.0636]

      Accuracy in both directions, of the same pass:

      >>> loss, found = ce_jax.clip_loss(images, texts, return_statistics=True)
      >>> print((found.text_of_image == jnp.arange(2)).mean())
      1.0
      >>> print((found.image_of_text == jnp.arange(2)).mean())
      1.0

    References:
      Radford et al., `Learning Transferable Visual Models From Natural Language Supervision`,
      2021; Zhang et al., `Contrastive Learning of Medical Visual Representations from Paired
      Images and Text`, 2020.
    """
    return _clip(
        images,
        texts,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        sample_weight,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction),
        return_statistics=return_statistics,
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _clip(
    images: Array,
    texts: Array,
    where: Array | None,
    logit_scale: Array,
    sample_weight: Array | None,
    *,
    axis_name: str | None,
    reduction: Reducer,
    return_statistics: bool,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss | tuple[Loss, ClipStatistics]:
    x = sides("images", images, "texts", texts, where, logit_scale, axis_name)
    of_images, of_texts = pairs.both_directions(
        x,
        argmax=return_statistics,
        axis_name=axis_name,
        memory_budget=memory_budget,
        forward_mode=forward_mode,
    )
    n = x.rows.shape[0]
    of_texts = jax.tree.map(lambda y: jax.lax.dynamic_slice_in_dim(y, x.first, n), of_texts)
    mean = (of_images.cross + of_texts.cross) / 2
    loss = reduced(mean, x.row_counts, sample_weight, axis_name, reduction)
    if not return_statistics:
        return loss
    found, exists = ClipStatistics(of_images.argmax, of_texts.argmax), x.row_counts
    if exists is not None:
        found = jax.tree.map(lambda ids: jnp.where(exists, ids, 0), found)
    return loss, found


@reducible
def siglip_loss(
    images: ArrayLike,
    texts: ArrayLike,
    where: ArrayLike | None = None,
    *,
    logit_scale: Scalar = 1.0,
    logit_bias: Scalar = 0.0,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
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
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: needed by `jax.jvp`, `jax.jacfwd` and `jax.linearize`: the derivative is then
        JAX's own.

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
    return _siglip(
        images,
        texts,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        scalar("logit_bias", logit_bias),
        sample_weight,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _siglip(
    images: Array,
    texts: Array,
    where: Array | None,
    logit_scale: Array,
    logit_bias: Array,
    sample_weight: Array | None,
    *,
    axis_name: str | None,
    reduction: Reducer,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss:
    x = sides("images", images, "texts", texts, where, logit_scale, axis_name)
    x = without_silent(x, sample_weight)
    bias = logit_bias.astype(wide(x.rows.dtype))
    loss = pairs.decisions(x, bias, memory_budget=memory_budget, forward_mode=forward_mode)
    return reduced(loss, x.row_counts, sample_weight, axis_name, reduction)
