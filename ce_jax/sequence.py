"""Next-token training and its metrics: shifted labels, masks, perplexity, bits per byte."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._arguments import checks
from ._arguments.compiled import array, compiled
from ._arguments.types import ArrayLike
from ._rows.tile import wide


class NextTokens(NamedTuple):
    """What a language model reads and what it is to predict; see `next_tokens`.

    Attributes:
      inputs: tokens the model reads.
      labels: for each of them the token that follows.
      where: which of the labels count.
    """

    inputs: Integer[Array, "*batch positions"]
    labels: Integer[Array, "*batch positions"]
    where: Bool[Array, "*batch positions"]


def next_tokens(
    tokens: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    where: ArrayLike | None = None,
    pad_id: int | None = None,
) -> NextTokens:
    r"""Inputs, labels and mask with which a sequence is learnt token by token.

    .. math::
      x_t = \mathrm{token}_t, \qquad y_t = \mathrm{token}_{t+1}, \qquad t = 0, \ldots, L - 2

    Where several documents are packed into one sequence, the first token of the next one is
    nothing to be predicted from the last of this one: `segment_ids` tell them apart. Keeping
    attention inside a document is up to the model.

    Args:
      tokens: token ids `[..., L]`, of any integer dtype, L at least 1.
      segment_ids: document of each token `[..., L]`, of any integer dtype; 0 is padding.
      where: bool, with the axes of `tokens` (size 1 broadcasts) or none: the tokens to learn to
        predict, such as those of an answer and not of its question.
      pad_id: token that is padding, and so not predicted. Don't give it where the same id also
        ends a document: use `where` or `segment_ids`.

    Returns:
      A named tuple of arrays `[..., L - 1]`; its `labels` and `where` are those of the losses.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> tokens, segments = jnp.array([5, 6, 7, 8, 0]), jnp.array([1, 1, 2, 2, 0])
      >>> pairs = ce_jax.next_tokens(tokens, segment_ids=segments)
      >>> print(pairs.inputs, pairs.labels, pairs.where)
      [5 6 7 8] [6 7 8 0] [ True False  True False]

    References:
      Bengio et al., `A Neural Probabilistic Language Model`, 2003; packing: Raffel et al.,
      `Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer`, 2020.
    """
    return _next_tokens(tokens, segment_ids, where, pad_id=checks.integer_option("pad_id", pad_id))


@compiled
def _next_tokens(
    tokens: Array,
    segment_ids: Array | None,
    where: Array | None,
    *,
    pad_id: int | None,
) -> NextTokens:
    tokens = checks.integer("tokens", tokens)
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ValueError(f"tokens must have shape [..., L] with L >= 1, got {tokens.shape}")
    labels = tokens[..., 1:]
    counts = jnp.ones(labels.shape, bool)
    if pad_id is not None:
        limits = jnp.iinfo(tokens.dtype)
        if limits.min <= pad_id <= limits.max:  # no token of this dtype can be equal to it
            counts &= labels != pad_id
    if segment_ids is not None:
        segment_ids = checks.integer("segment_ids", segment_ids)
        checks.shape_is("segment_ids", segment_ids, tokens.shape, "the shape of tokens")
        here, there = segment_ids[..., :-1], segment_ids[..., 1:]
        counts &= (here == there) & (there != 0)
    if where is not None:
        where = checks.boolean("where", where)
        counts &= checks.of_rows("where", where, tokens.shape, "tokens")[..., 1:]
    return NextTokens(tokens[..., :-1], labels, counts)


def perplexity(total: ArrayLike, count: ArrayLike) -> Float[Array, "..."]:
    r"""Perplexity, from the sum of the losses and their number.

    .. math:: e^{L / N}

    Of a corpus it has to be taken from the sums over all of it: a mean of the perplexities of
    batches is not it, nor is the exponential of a mean of means of batches of unequal size.

    Args:
      total: sum of the cross-entropies in nats, of any shape.
      count: number of tokens that count, with the axes of `total` (size 1 broadcasts) or none;
        `mean_denominator`.

    Returns:
      The perplexity, of the shape of `total`, in float32 (float64 for a float64 total). NaN where
      the count is 0.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.perplexity(100 * jnp.log(8.0), 100).round(4))
      8.0

    References:
      Jelinek et al., `Perplexity: a Measure of the Difficulty of Speech Recognition Tasks`, 1977.
    """
    return _per_item(total, count, name="count", bits=False)


def bits_per_byte(total: ArrayLike, num_bytes: ArrayLike) -> Float[Array, "..."]:
    r"""Length of the text's encoding by the model, in bits for each byte of the text.

    .. math:: \frac{L}{B \ln 2}

    Unlike perplexity it can be compared between tokenizers.

    Args:
      total: sum of the cross-entropies of all tokens in nats, of any shape.
      num_bytes: number of bytes of the text, in UTF-8 as a rule; with the axes of `total` (size 1
        broadcasts) or none.

    Returns:
      The number of bits, of the shape of `total`, in float32 (float64 for a float64 total). NaN
      where there are no bytes.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.bits_per_byte(100 * jnp.log(8.0), 300).round(4))
      1.0

    References:
      Gao et al., `The Pile: An 800GB Dataset of Diverse Text for Language Modeling`, 2020.
    """
    return _per_item(total, array("num_bytes", num_bytes), name="num_bytes", bits=True)


@compiled
def _per_item(total: Array, count: Array, *, name: str, bits: bool) -> Array:
    nats, items = checks.real("total", total), checks.real(name, count)
    items = checks.of_rows(name, items, nats.shape, "total")
    nats, items = (x.astype(wide(nats.dtype)) for x in (nats, items))
    mean = jnp.where(items == 0, jnp.nan, nats / jnp.where(items == 0, 1, items))
    return mean / math.log(2) if bits else jnp.exp(mean)
