r"""Contrastive losses: find the pairs that belong together among all pairs of the batch.

The logits of all pairs are never in memory at once. They are computed in blocks, and again for the
gradient. If `jax.export` leaves the size of the batch open, there is one block. With `axis_name`,
inside `jax.shard_map`, the batch is sharded over a mesh axis: each device compares its own rows
with the columns of all, which it gathers once. The gathered columns take `[N, D]` of memory, little
beside a block of logits. In return there is one collective in the loss, and one in its derivative.

The scale multiplies the products of the embeddings, which are float32 even for narrower embeddings.
If the scale multiplied the embeddings, rounding to bfloat16 would make the second digit of the loss
wrong.
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
from ._arguments.sides import reduced, sides, without_silent_rows
from ._arguments.types import ArrayLike, Loss, Reduction, Scalar, reducible, with_statistics
from ._rows import pairs
from ._rows.dtypes import wide


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

    This is the cross-entropy of a linear layer whose kernel is the keys. For cosines, normalise the
    embeddings first. A temperature is :math:`1 / s`.

    Args:
      queries: embeddings `[N, D]`, floating.
      keys: embeddings `[M, D]` of the same dtype, M at least N. Key i belongs to query i. Keys
        beyond N belong to no query: hard negatives, for example, or a queue of earlier keys.
      where: bool `[N]`: the pairs that exist. Others are ignored, both as query and as key.
      logit_scale: s, at least 0. May be traced or learnt, for example as :math:`s = e^t`.
      sample_weight: weight of each query's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `queries`, `keys`, `where` and
        `sample_weight` are sharded by rows. Each query is compared with the keys of all devices.
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `keys`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that, to JAX, do not
        vary over `axis_name`.

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
    x = without_silent_rows(x, sample_weight)
    loss = pairs.one_direction(x, memory_budget=memory_budget, forward_mode=forward_mode)
    return reduced(loss, x.row_counts, sample_weight, axis_name, reduction)


class ClipStatistics(NamedTuple):
    """The most similar text of each image, and image of each text; see `clip_loss`.

    Ids number the pairs of all devices. For pair i the right id is i. With `axis_name` it is k N +
    i on device k, if each device holds N pairs.

    Attributes:
      text_of_image: the text with the largest logit; the first one if several are equal.
      image_of_text: the image with the largest logit; the first one if several are equal.
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
    r"""Mean of two cross-entropies: the text of each image, and the image of each text.

    .. math::
      \ell_i = \tfrac{1}{2} \Big( \log \sum_j e^{z_{ij}} - z_{ii} \Big)
        + \tfrac{1}{2} \Big( \log \sum_j e^{z_{ji}} - z_{ii} \Big),
      \qquad z_{ij} = s \langle a_i, b_j \rangle

    This is `info_nce_loss` in both directions. Each block of logits is computed once for both
    directions, and once more for the gradient. For cosines, normalise the embeddings first.

    Args:
      images: embeddings `[N, D]` of one modality, floating.
      texts: embeddings `[N, D]` of the other, of the same dtype.
      where: bool `[N]`: the pairs that exist. Others are ignored.
      logit_scale: s, at least 0, the inverse of the temperature. May be traced or learnt: CLIP
        learns t in :math:`s = e^t`, starts at :math:`s = 1 / 0.07`, and limits s to 100.
      sample_weight: weight of each pair, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `images`, `texts`, `where` and
        `sample_weight` are sharded by rows. Each pair is compared with the pairs of all devices.
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      return_statistics: return also, from the same pass, the most similar text of each image and
        the most similar image of each text.
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings). With
      `return_statistics`, a tuple of the loss and a `ClipStatistics` of int32 arrays `[N]`: ids
      among the pairs of all devices; 0 for a pair that does not exist.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that, to JAX, do not
        vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> images, texts = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
      >>> print(ce_jax.clip_loss(images, texts, logit_scale=10.0).round(4))
      [0.0091 0.0636]

      Accuracy in both directions, from the same pass:

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
    r"""Binary cross-entropy of each image with each text: 1 for a pair, 0 otherwise.

    .. math::
      \ell_i = \log(1 + e^{-z_{ii}}) + \sum_{j \ne i} \log(1 + e^{z_{ij}}),
      \qquad z_{ij} = s \langle a_i, b_j \rangle + b

    Each term needs one pair only, so there is no normaliser over the batch. For cosines, normalise
    the embeddings first.

    Args:
      images: embeddings `[N, D]` of one modality, floating.
      texts: embeddings `[N, D]` of the other, of the same dtype.
      where: bool `[N]`: the pairs that exist. Others are ignored.
      logit_scale: s, at least 0. May be traced or learnt: the paper learns t in :math:`s = e^t` and
        starts at :math:`s = 10`.
      logit_bias: b, which balances the many negatives against the few positives. May be traced or
        learnt: the paper starts at -10.
      sample_weight: weight of each image's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `images`, `texts`, `where` and
        `sample_weight` are sharded by rows. Each image is compared with the texts of all devices.
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the pairs that exist (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `texts`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that, to JAX, do not
        vary over `axis_name`.

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
    x = without_silent_rows(x, sample_weight)
    bias = logit_bias.astype(wide(x.rows.dtype))
    loss = pairs.decisions(x, bias, memory_budget=memory_budget, forward_mode=forward_mode)
    return reduced(loss, x.row_counts, sample_weight, axis_name, reduction)
