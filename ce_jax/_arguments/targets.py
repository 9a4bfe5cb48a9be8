"""Labels, masks and weights of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from .._rows import sharded
from .._rows.dtypes import wide
from .._rows.tile import ABSENT
from . import checks, reductions
from .types import ArrayLike, Axes

# Advice for class ids in place of a distribution.
_OF_IDS = (
    "; of class ids jax.nn.one_hot makes such labels, or they go to "
    "softmax_cross_entropy_with_integer_labels"
)


class Rows(NamedTuple):
    """Logits (or log-probabilities, or labels) by rows.

    Attributes:
      values: the class axis is last; classes excluded by `where` hold -inf.
      counts: which rows count; None if nothing excludes any.
    """

    values: Float[Array, "*rows classes"]
    counts: Bool[Array, "*rows"] | None


class ClassIds(NamedTuple):
    """Integer labels, checked. Without labels, only `counts` is there.

    Attributes:
      ids: class ids that are safe to index with; 0 where the label is out of range or the row does
        not count.
      counts: which rows count; None if nothing excludes any.
      unknown: rows that count and have a label that is not a class.
    """

    ids: Integer[Array, "*rows"]
    counts: Bool[Array, "*rows"] | None
    unknown: Bool[Array, "*rows"]


class Elements(NamedTuple):
    """What an element-wise loss is made of, in the shape of its first input.

    Attributes:
      values: the input; 0.5 in elements that do not count, or are NaN and weigh nothing.
      labels: binary labels, smoothed, in the loss's dtype; 0 (before smoothing) in elements that do
        not count, or are not finite and weigh nothing.
      counts: which elements count; None if nothing excludes any.
      weights: sample weights; None if there are none.
    """

    values: Float[Array, "*shape"]
    labels: Float[Array, "*shape"]
    counts: Bool[Array, "*shape"] | None
    weights: Float[Array, "*shape"] | None


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """Moves `axes`, flattened in their order, to one axis at the end."""
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    if rest + axes != tuple(range(x.ndim)):
        x = jnp.transpose(x, rest + axes)
    if len(axes) == 1:
        return x
    rows = x.shape[: len(rest)]
    return jnp.reshape(x, (*rows, -1 if x.size else math.prod(x.shape[len(rest) :])))


def rows_of(
    name: str,
    x: ArrayLike,
    axis: int | Sequence[int] | None,
    where: ArrayLike | None,
    axis_name: str | None = None,
) -> Rows:
    """Splits `where` into rows and classes by its number of dimensions, and applies the classes.

    A row none of whose classes is included does not count.
    """
    x = checks.floating(name, x)
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, the class axis; got shape ()")
    axes = checks.axes(axis, x.ndim)
    shape = x.shape
    x = classes_last(x, axes)
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {shape} with axis {axis}")
    if where is None:
        return Rows(x, None)
    where = checks.boolean("where", where)
    if where.ndim == len(shape):
        included = checks.of_rows("where", where, shape, name)
        included = classes_last(included, axes)
        most = sharded.max_over(jnp.max(included, -1).astype(jnp.float32), axis_name)
        return Rows(jnp.where(included, x, -jnp.inf), most > 0)
    return Rows(x, checks.rows_to_include(where, x.shape[:-1], name, shape))


def without_excluded(
    x: Float[Array, "*rows classes"],
    counts: Bool[Array, "*rows"] | None,
    sample_weight: Float[Array, "*rows"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*rows classes"]:
    """Zeros the rows that are not `effective`, so that no NaN or inf in them reaches anything."""
    keep = effective(x, counts, sample_weight, axis_name)
    return x if keep is None else jnp.where(keep[..., None], x, 0)


def without_silent(
    x: Float[Array, "*rows width"], sample_weight: Float[Array, "*rows"] | None
) -> Float[Array, "*rows width"]:
    """Zeros the rows of hidden states that hold a NaN or infinity and have weight 0."""
    if sample_weight is None:
        return x
    silent = (sample_weight == 0) & ~jnp.all(jnp.isfinite(x), -1)
    return jnp.where(silent[..., None], 0, x)


def effective(
    x: Float[Array, "*rows classes"],
    counts: Bool[Array, "*rows"] | None,
    sample_weight: Float[Array, "*rows"] | None,
    axis_name: str | None,
) -> Bool[Array, "*rows"] | None:
    """The rows that may have an effect on any derivative; None if nothing excludes any.

    A row that does not count has none, nor has one of weight 0 where logits hold a NaN or have no
    normaliser, or labels hold a NaN or infinity. Other rows of weight 0 may: the derivative with
    respect to their weight is their loss.
    """
    if sample_weight is None:
        return counts
    return checks.both(counts, ~_silent(x, sample_weight, axis_name))


def _silent(
    x: Float[Array, "*rows classes"], sample_weight: Float[Array, "*rows"], axis_name: str | None
) -> Bool[Array, "*rows"]:
    found = sharded.max_over(largest(jax.lax.stop_gradient(x)), axis_name)
    return (sample_weight == 0) & ~jnp.isfinite(found)


def largest(x: Float[Array, "*rows classes"]) -> Float[Array, "*rows"]:
    """The largest number of each row, inf if one is NaN.

    On a CPU XLA's maximum of more than a few numbers passes over NaN, its sum does not.
    """
    return jnp.where(jnp.isnan(jnp.sum(jnp.abs(x), -1)), jnp.inf, jnp.max(x, -1))


def distributions(
    labels: ArrayLike, shape: tuple[int, ...], axis: int | Sequence[int] | None, dtype: DTypeLike
) -> Float[Array, "*rows classes"]:
    """Labels that give every class a number, by rows, in the loss's dtype."""
    labels = checks.real("labels", labels)
    axes = checks.axes(axis, len(shape))
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape != shape:
        raise ValueError(
            f"labels of an integer dtype must have the shape of logits, {shape}, a number for each "
            f"class, got {labels.shape}{_OF_IDS}"
        )
    whole = (1,) * (len(shape) - labels.ndim) + labels.shape
    rows = tuple(n for a, n in enumerate(shape) if a not in axes)
    one_each = labels.shape == rows  # a number for each row, or for each class of one
    if len(whole) == len(shape) and any(
        whole[a] != shape[a] and (whole[a] == 1 or one_each) for a in axes
    ):
        raise ValueError(
            f"labels must have a number for every class of logits, {shape} with the class axis "
            f"{axis}, got {labels.shape}{_OF_IDS}"
        )
    labels = checks.broadcast("labels", labels.astype(dtype), shape, "the shape of logits")
    return classes_last(labels, axes)


def class_ids(
    labels: ArrayLike,
    rows: Sequence[int],
    classes: int,
    counts: Bool[Array, "*rows"] | None,
    ignore_index: int | None,
    axis: Axes = None,
) -> ClassIds:
    """Checks the labels of rows of the given shape and makes them safe to index with.

    `axis` is the argument of this name, if there is one, for advice.
    """
    per_class = (
        "; of one-hot labels jnp.argmax makes class ids; other labels that give each class a number"
        " go to softmax_cross_entropy"
    )
    if not rows:
        per_class += "; labels that say yes or no, to sigmoid_binary_cross_entropy"
    shape: tuple[int, ...] = getattr(labels, "shape", ())
    too_many = len(shape) == len(rows) + 1 and not checks.indexing("labels", shape, rows)
    cure = per_class if too_many else "; write labels.astype(int)"
    labels = checks.integer("labels", labels, cure)
    if too_many:
        raise ValueError(
            f"labels must have shape {tuple(rows)} (one class id per row), got {labels.shape}"
            + per_class
        )
    cure, whole = "", (*rows, classes)
    for other in range(len(rows)) if axis == -1 else ():
        if shape == (*whole[:other], *whole[other + 1 :]):
            cure = f"; if the classes are in axis {other}, write axis={other}"
    checks.shape_is("labels", labels, rows, "one class id per row", cure)
    counts = without_ignored(labels, counts, ignore_index)
    labels = checks.of_32_bits(labels)
    valid = (labels >= 0) & (labels < classes)
    unknown, usable = checks.both(counts, ~valid), checks.both(counts, valid)
    return ClassIds(jnp.where(usable, labels, 0).astype(jnp.int32), counts, unknown)


def maybe_class_ids(
    labels: ArrayLike | None,
    rows: Sequence[int],
    classes: int,
    counts: Bool[Array, "*rows"] | None,
    ignore_index: int | None,
    axis: Axes = None,
) -> ClassIds:
    """`class_ids`, or what is known of rows without labels."""
    if labels is not None:
        return class_ids(labels, rows, classes, counts, ignore_index, axis)
    if ignore_index is not None:
        raise ValueError("ignore_index needs labels, but there are none; write where=")
    return ClassIds(ABSENT, counts, ABSENT)


def nan_if(
    unknown: Bool[Array, "*rows"], loss: Float[Array, "*rows"], sample_weight: Array | None = None
) -> Float[Array, "*rows"]:
    """Makes loss and gradient NaN in rows with an unknown label, unless their weight is 0."""
    if sample_weight is not None:
        unknown = unknown & (sample_weight != 0)
    return loss * jnp.where(unknown, jnp.array(jnp.nan, loss.dtype), 1)


def without_ignored(
    labels: Integer[Array, "*rows"], counts: Bool[Array, "*rows"] | None, ignore_index: int | None
) -> Bool[Array, "*rows"] | None:
    """`counts` less the rows whose label is `ignore_index`."""
    ignored = checks.equal(labels, ignore_index)
    return counts if ignored is None else checks.both(counts, ~ignored)


def class_weight(weight: ArrayLike | None, classes: int, dtype: DTypeLike) -> Array | None:
    """Per-class weights in the loss's dtype."""
    if weight is None:
        return None
    weight = checks.real("weight", weight)
    checks.shape_is("weight", weight, (classes,), "one weight per class")
    return weight.astype(dtype)


def elements(
    name: str,
    x: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    label_smoothing: ArrayLike | None,
    sample_weight: ArrayLike | None,
) -> Elements:
    """Checks the arguments of an element-wise loss; an element is a row of its own."""
    x, labels = checks.floating(name, x), checks.real("labels", labels)
    shape, cure = x.shape, ""
    of_ids = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == shape[:-1]
    if of_ids and shape and shape[-1] != 1:
        cure = f"; of class ids jax.nn.one_hot(labels, {shape[-1]}) makes a label for each class"
    labels = labels.astype(wide(x.dtype))
    labels = checks.broadcast("labels", labels, shape, f"the shape of {name}", cure)
    labels = sharded.with_sharding_of(labels, x)
    counts = checks.mask(where, shape, "the loss")
    if counts is not None:
        counts = sharded.with_sharding_of(counts, x)
        x, labels = jnp.where(counts, x, 0.5), jnp.where(counts, labels, 0)
    weights = reductions.weights(sample_weight, shape, labels.dtype)
    if weights is not None:
        weights = sharded.with_sharding_of(weights, x)
        x = jnp.where((weights == 0) & jnp.isnan(x), 0.5, x)
        labels = jnp.where((weights == 0) & ~jnp.isfinite(labels), 0, labels)
    if label_smoothing is not None:
        eps = jnp.asarray(label_smoothing, labels.dtype)
        labels = (1 - eps) * labels + eps / 2
    return Elements(x, labels, counts, weights)
