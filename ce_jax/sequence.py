"""Next-token training and its metrics: shifted labels, sums, perplexity, bits per byte."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ._arguments import checks
from ._arguments.compiled import compiled, numeric
from ._arguments.types import ArrayLike
from ._rows.dtypes import wide


class NextTokens(NamedTuple):
    """Inputs and labels of a language model; see `next_tokens`.

    Attributes:
      inputs: tokens the model reads.
      labels: for each of these tokens, the token to predict.
      where: bool; the labels that count.
    """

    inputs: Integer[Array, "*batch positions"]
    labels: Integer[Array, "*batch positions"]
    where: Bool[Array, "*batch positions"]


def next_tokens(
    tokens: ArrayLike,
    *,
    shift: int = 1,
    keep_length: bool = False,
    segment_ids: ArrayLike | None = None,
    where: ArrayLike | None = None,
    pad_id: int | None = None,
) -> NextTokens:
    r"""Inputs, labels and mask of next-token prediction.

    .. math::
      x_t = \mathrm{token}_t, \qquad y_t = \mathrm{token}_{t+s}, \qquad t = 0, \ldots, L - 1 - s

    If several documents are packed into one sequence, `segment_ids` tell which token belongs to
    which document, so that no token is predicted from another document. The model itself must keep
    its attention inside a document.

    For several heads (the first predicts the next token, the second the token after it, and so on)
    call this function with a `shift` of 1, 2 and so on. With `keep_length` all labels fit one array
    of hidden states.

    Args:
      tokens: token ids `[..., L]`, of any integer dtype, L at least 1.
      shift: s, the number of tokens between an input and its label. At least 1.
      keep_length: return as many positions as there are tokens. The last s of each row have no
        label: there `labels` is 0 and `where` False. Needed for a sequence that is sharded over a
        mesh axis, because L - s positions do not divide among the devices.
      segment_ids: document of each token `[..., L]`, of any integer dtype; 0 is padding. A label
        never comes from another document than its input.
      where: bool, a scalar or an array with the axes of `tokens` (size 1 broadcasts): the tokens to
        predict, for example those of an answer but not those of its question.
      pad_id: id of the padding token, which is not predicted. If the same id also ends a document,
        use `where` or `segment_ids` instead.

    Returns:
      A named tuple of arrays `[..., L - s]`, or `[..., L]` with `keep_length`; `labels` and `where`
      are arguments of the losses.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape that does not fit, or a `shift` below 1 or (without `keep_length`)
        above L.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> tokens, segments = jnp.array([5, 6, 7, 8, 0]), jnp.array([1, 1, 2, 2, 0])
      >>> pairs = ce_jax.next_tokens(tokens, segment_ids=segments)
      >>> print(pairs.inputs, pairs.labels, pairs.where)
      [5 6 7 8] [6 7 8 0] [ True False  True False]

      Three heads that share the kernel of the last layer, for 1, 2 and 3 tokens ahead:

      >>> ahead = [ce_jax.next_tokens(tokens, shift=s, keep_length=True) for s in (1, 2, 3)]
      >>> labels = jnp.stack([x.labels for x in ahead])
      >>> where = jnp.stack([x.where for x in ahead])
      >>> hidden, kernel = jnp.ones((3, 5, 4)), jnp.ones((4, 9))
      >>> loss = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, where=where)
      >>> print(loss.shape, where.sum(axis=-1))
      (3, 5) [4 3 2]

    References:
      Bengio et al., `A Neural Probabilistic Language Model`, 2003; packing: Raffel et al.,
      `Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer`, 2020;
      several tokens ahead: Gloeckle et al., `Better & Faster Large Language Models via Multi-token
      Prediction`, 2024.
    """
    return _next_tokens(
        tokens,
        segment_ids,
        where,
        shift=checks.positive_int("shift", shift),
        keep_length=keep_length,
        pad_id=checks.integer_option("pad_id", pad_id),
    )


@compiled
def _next_tokens(
    tokens: Array,
    segment_ids: Array | None,
    where: Array | None,
    *,
    shift: int,
    keep_length: bool,
    pad_id: int | None,
) -> NextTokens:
    tokens = checks.integer("tokens", tokens)
    length = tokens.shape[-1] if tokens.ndim else 0
    least = 1 if keep_length else shift
    if isinstance(length, int) and length < least:
        too_long = ", the shift; write keep_length=True" if length > 0 else ""
        raise ValueError(
            f"tokens must have shape [..., L] with L >= {least}{too_long}, got {tokens.shape}"
        )
    labels = _ahead(tokens, shift)
    counts = _ahead(jnp.ones_like(tokens, bool), shift)
    padding = checks.equal(labels, pad_id)
    if padding is not None:
        counts &= ~padding
    if segment_ids is not None:
        segment_ids = checks.integer("segment_ids", segment_ids)
        checks.shape_is("segment_ids", segment_ids, tokens.shape, "the shape of tokens")
        counts &= segment_ids != 0
        for steps in range(1, shift + 1):  # documents further apart may have equal ids
            counts &= _ahead(segment_ids, steps) == segment_ids
    included = checks.mask(where, tokens.shape, "tokens")
    if included is not None:
        counts &= _ahead(included, shift)
    found = NextTokens(tokens, labels, counts)
    return found if keep_length else NextTokens(*(x[..., : length - shift] for x in found))


def _ahead(x: Array, steps: int) -> Array:
    """`x[..., t + steps]` in place t, and 0 beyond the end.

    By padding, which works on a sharded axis: the length of a slice might not be divisible.
    """
    length = x.shape[-1]
    if isinstance(length, int):
        steps = min(steps, length)
    rest = [(0, 0, 0)] * (x.ndim - 1)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [*rest, (-steps, steps, 0)])


def sequence_log_prob(
    log_prob: ArrayLike,
    where: ArrayLike | None = None,
    *,
    mean: bool = False,
) -> Float[Array, "..."]:
    r"""Log-probability of each sequence, from the log-probabilities of its tokens.

    .. math:: \log p(y) = \sum_t \log p(y_t \mid y_{<t})

    Args:
      log_prob: log-probabilities of the tokens `[..., T]` in nats, floating, such as
        `linear_softmax_statistics(...).log_prob`.
      where: bool, a scalar or an array with the axes of `log_prob` (size 1 broadcasts): the tokens
        to include, for example those of an answer. Others are ignored, even if they are NaN or
        infinite.
      mean: divide by the number of included tokens, for losses that normalise by length. Without
        any token, result and gradient are 0.

    Returns:
      An array `[...]` in float32 (float64 for float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> log_prob, where = jnp.array([-1.0, -2.0, -jnp.inf]), jnp.array([True, True, False])
      >>> print(ce_jax.sequence_log_prob(log_prob, where))
      -3.0
      >>> print(ce_jax.sequence_log_prob(log_prob, where, mean=True))
      -1.5

    References:
      Bengio et al., `A Neural Probabilistic Language Model`, 2003.
    """
    return _sequence_log_prob(log_prob, where, mean=mean)


@compiled
def _sequence_log_prob(log_prob: Array, where: Array | None, *, mean: bool) -> Array:
    x = checks.floating("log_prob", log_prob)
    if x.ndim == 0:
        raise ValueError(f"log_prob must have shape [..., T], got {x.shape}")
    x = x.astype(wide(x.dtype))
    counts = checks.included(where, x.shape, "log_prob")
    total = jnp.sum(jnp.where(counts, x, 0), -1)
    if not mean:
        return total
    return total / jnp.maximum(jnp.sum(counts, -1, dtype=x.dtype), 1)


def perplexity(total: ArrayLike, count: ArrayLike) -> Float[Array, "..."]:
    r"""Perplexity, from the sum of the losses and the number of tokens.

    .. math:: e^{L / N}

    For the perplexity of a corpus, take L and N over the whole corpus. The mean of the perplexities
    of batches is a different number; so is the exponential of a mean of batch means if the batches
    have unequal sizes.

    Args:
      total: sum of the cross-entropies in nats, of any shape.
      count: number of tokens that count, a scalar or an array with the axes of `total` (size 1
        broadcasts); `mean_denominator`.

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
    return _perplexity(numeric("total", total), numeric("count", count))


def bits_per_byte(total: ArrayLike, num_bytes: ArrayLike) -> Float[Array, "..."]:
    r"""Number of bits per byte that the model needs to encode a text.

    .. math:: \frac{L}{B \ln 2}

    Unlike perplexity, it can be compared between tokenizers.

    Args:
      total: sum of the cross-entropies of all tokens in nats, of any shape.
      num_bytes: number of bytes of the text, usually in UTF-8; a scalar or an array with the axes
        of `total` (size 1 broadcasts).

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
    return _bits_per_byte(numeric("total", total), numeric("num_bytes", num_bytes))


@compiled
def _perplexity(total: Array, count: Array) -> Array:
    return jnp.exp(_mean(total, "count", count))


@compiled
def _bits_per_byte(total: Array, num_bytes: Array) -> Array:
    return _mean(total, "num_bytes", num_bytes) / math.log(2)


def _mean(total: Array, name: str, count: Array) -> Array:
    nats, items = checks.real("total", total), checks.real(name, count)
    nats, items = (x.astype(wide(nats.dtype)) for x in (nats, items))
    items = checks.of_rows(name, items, nats.shape, "total")
    return jnp.where(items == 0, jnp.nan, nats / jnp.where(items == 0, 1, items))
