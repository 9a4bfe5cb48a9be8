"""Negatives for losses over a sample of the classes, with their expected counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from ._arguments import checks, targets
from ._arguments.compiled import compiled
from ._arguments.types import ArrayLike
from ._rows.dtypes import wide


class Negatives(NamedTuple):
    """Classes drawn with replacement, for all rows or for each row; see the samplers.

    Attributes:
      ids: class ids `[S]` or `[..., S]`.
      log_expected_count: for each id, the logarithm of its expected number in a draw of S classes:
        S times the probability of the class. +inf marks an entry that is not a negative.
    """

    ids: Integer[Array, "*batch samples"]
    log_expected_count: Float[Array, "*batch samples"]


def uniform_negatives(
    key: PRNGKeyArray, num_samples: int, num_items: int, *, shape: tuple[int, ...] = ()
) -> Negatives:
    r"""Draws classes with replacement from the uniform distribution.

    .. math:: q_k = \frac{1}{C}

    Args:
      key: a key of `jax.random`.
      num_samples: S, the number of classes to draw.
      num_items: C, the number of classes.
      shape: leading axes of the result, each entry with its own S classes. Leave it empty if all
        rows share the negatives.

    Returns:
      The ids `[*shape, S]`, int32, and their log expected counts :math:`\log (S q_k)`.

    Raises:
      TypeError: for a number that is not an int, or a `key` that is not one key.
      ValueError: for a number below 1, or a `num_items` of 2^31 or more.

    Example:
      >>> import jax, ce_jax
      >>> negatives = ce_jax.uniform_negatives(jax.random.key(0), 5, 1000)
      >>> print(negatives.ids.shape, negatives.log_expected_count[0])
      (5,) -5.2983

    References:
      Bengio and Senécal, `Quick Training of Probabilistic Neural Nets by Importance Sampling`,
      2003.
    """
    samples, items = _sizes(num_samples, num_items)
    return _uniform_negatives(checks.random_key("key", key), samples, items, _shape(shape))


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _uniform_negatives(
    key: PRNGKeyArray, samples: int, items: int, shape: tuple[int, ...]
) -> Negatives:
    ids = jax.random.randint(key, (*shape, samples), 0, items, jnp.int32)
    return Negatives(ids, jnp.full(ids.shape, jnp.log(samples / items)))


def log_uniform_negatives(
    key: PRNGKeyArray, num_samples: int, num_items: int, *, shape: tuple[int, ...] = ()
) -> Negatives:
    r"""Draws classes by Zipf's law, with replacement. Class 0 must be the most frequent one.

    .. math:: q_k = \frac{\log (k + 2) - \log (k + 1)}{\log (C + 1)}

    Class ids must be sorted by decreasing frequency. Every class is drawn with its probability, up
    to rounding errors, for any C below 2^31.

    Args:
      key: a key of `jax.random`.
      num_samples: S, the number of classes to draw.
      num_items: C, the number of classes.
      shape: leading axes of the result, each entry with its own S classes. Leave it empty if all
        rows share the negatives.

    Returns:
      The ids `[*shape, S]`, int32, and their log expected counts :math:`\log (S q_k)`.

    Raises:
      TypeError: for a number that is not an int, or a `key` that is not one key.
      ValueError: for a number below 1, or a `num_items` of 2^31 or more.

    Example:
      >>> import jax, ce_jax
      >>> negatives = ce_jax.log_uniform_negatives(jax.random.key(0), 1000, 50_000)
      >>> print((negatives.ids < 50).mean() > 0.3)
      True

    References:
      Zipf, `Human Behavior and the Principle of Least Effort`, 1949; as a proposal for sampled
      softmax: Jozefowicz et al., `Exploring the Limits of Language Modeling`, 2016.
    """
    samples, items = _sizes(num_samples, num_items)
    return _log_uniform_negatives(checks.random_key("key", key), samples, items, _shape(shape))


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _log_uniform_negatives(
    key: PRNGKeyArray, samples: int, items: int, shape: tuple[int, ...]
) -> Negatives:
    def halve(step: int | Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, size = interval  # of k + 1, which lies in [low, low + size)
        half = size - size // 2  # not (size + 1) // 2, which may overflow
        at = low.astype(jnp.float32)
        left, both = (x.astype(jnp.float32) / at for x in (half, size))
        below = jnp.log1p(left) / jnp.log1p(both)
        u = jax.random.uniform(jax.random.fold_in(key, step), low.shape, jnp.float32)
        is_below = u < below
        return jnp.where(is_below, low, low + half), jnp.where(is_below, half, size - half)

    one = jnp.ones((*shape, samples), jnp.int32)
    steps = (items - 1).bit_length()
    low, _ = jax.lax.fori_loop(0, steps, halve, (one, jnp.full_like(one, items)))
    ids = low - 1
    return Negatives(ids, _log_uniform_log_prob(ids, items=items) + jnp.log(samples))


def log_uniform_log_prob(ids: ArrayLike, num_items: int) -> Float[Array, "..."]:
    r"""Log-probability with which `log_uniform_negatives` draws a class.

    .. math:: \log q_k = \log \frac{\log (k + 2) - \log (k + 1)}{\log (C + 1)}

    Args:
      ids: class ids of any integer dtype and shape.
      num_items: C, the number of classes.

    Returns:
      Log-probabilities of the shape of `ids`; NaN for an id outside `[0, C)`.

    Raises:
      TypeError: for ids of another dtype, or a number that is not an int.
      ValueError: for a number below 1, or a `num_items` of 2^31 or more.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(jnp.exp(ce_jax.log_uniform_log_prob(jnp.arange(3), 3)))
      [0.5    0.2925 0.2075]

    References:
      Zipf, `Human Behavior and the Principle of Least Effort`, 1949.
    """
    return _log_uniform_log_prob(ids, items=_items(num_items))


@compiled
def _log_uniform_log_prob(ids: Array, *, items: int) -> Array:
    ids = checks.integer("ids", ids)
    valid = ~targets.class_ids(ids, ids.shape, items, None, None).unknown
    k = jnp.where(valid, ids, 0).astype(jnp.result_type(float))
    log_prob = jnp.log(jnp.log1p(1 / (k + 1))) - jnp.log(jnp.log1p(items))
    return jnp.where(valid, log_prob, jnp.nan)


def in_batch_negatives(
    labels: ArrayLike,
    log_prob: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> Negatives:
    r"""The labels of the other rows of the batch as negatives of each row.

    .. math:: \log (\mathrm{expected\ count\ of\ } y_j) = \log \left( (N - 1)\, q_{y_j} \right)

    The labels of the other N - 1 rows are a sample of the classes, drawn with the frequency of the
    classes in the data. A row's own label is not a negative: the sampled losses leave out negatives
    that equal the label.

    Args:
      labels: class ids `[N]`, of any integer dtype.
      log_prob: log-probability `[N]` of each of these labels in the data, from counts for example.
      where: bool `[N]`: the rows that exist.

    Returns:
      The ids `[N]` and log expected counts, shared by all rows of the batch.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> counts = jnp.array([60, 30, 10])
      >>> labels = jnp.array([0, 2, 0, 1, 0])
      >>> log_prob = jnp.log(counts / counts.sum())[labels]
      >>> negatives = ce_jax.in_batch_negatives(labels, log_prob)
      >>> print(negatives.ids, jnp.exp(negatives.log_expected_count[1]))
      [0 2 0 1 0] 0.4

    References:
      Yi et al., `Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations`,
      2019.
    """
    return _in_batch_negatives(labels, log_prob, where)


@compiled
def _in_batch_negatives(labels: Array, log_prob: Array, where: Array | None) -> Negatives:
    labels, log_prob = checks.integer("labels", labels), checks.floating("log_prob", log_prob)
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {labels.shape}")
    checks.shape_is("log_prob", log_prob, labels.shape, "one per label")
    log_prob = log_prob.astype(wide(log_prob.dtype))
    exists = checks.included(where, labels.shape, "labels")
    others = jnp.maximum(jnp.sum(exists) - 1, 1).astype(log_prob.dtype)
    log_count = jnp.where(exists, log_prob + jnp.log(others), jnp.inf)
    return Negatives(jnp.where(exists, labels, 0), log_count)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or not all(
        hasattr(size, "__index__") and size >= 0 for size in shape
    ):
        raise TypeError(f"shape must be a tuple of ints of at least 0, got {shape!r}")
    return tuple(shape)


def _sizes(num_samples: int, num_items: int) -> tuple[int, int]:
    return checks.positive_int("num_samples", num_samples), _items(num_items)


def _items(num_items: int) -> int:
    items = checks.positive_int("num_items", num_items)
    if items >= 2**31:
        raise ValueError(f"num_items must be below 2^31, as ids have 32 bits, got {num_items}")
    return items
