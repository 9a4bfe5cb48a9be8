"""Losses of the matrix of all pairs, `scale * rows @ columns.T`, read in blocks of columns.

Four ways of reading a block: as a softmax over the columns, as one and a softmax over the rows
besides, as independent binary decisions, and as a softmax over the columns whose target are several
of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .. import _platform
from .._platform import block_sizes
from . import logistic, sharded, tile
from .blocks import over_blocks, put, take
from .columns import Form, Part, over_columns
from .dtypes import wide
from .head import Head, Tokens
from .head import logits as products_of
from .picked import First, is_label
from .tile import ABSENT, Partial, RowStatistics, Target, merge


class Sides(NamedTuple):
    """Both sides of the pairs.

    Attributes:
      rows: this device's.
      columns: those of all devices.
      scale: what the products of rows and columns are multiplied by.
      first: the column with which the first row is paired.
      row_counts: rows that exist; None if all do.
      column_counts: columns that exist; None if all do.
      row_group: the group of each row, where there are groups.
      column_group: the group of each column.
      positives: how many others are in the row's group, at least 1.
    """

    rows: Float[Array, "n width"]
    columns: Float[Array, "m width"]
    scale: Float[Array, ""]
    first: Integer[Array, ""]
    row_counts: Bool[Array, " n"] | None
    column_counts: Bool[Array, " m"] | None
    row_group: Integer[Array, " n"] = ABSENT
    column_group: Integer[Array, " m"] = ABSENT
    positives: Float[Array, " n"] = ABSENT


# The differentiable inputs of a form, or their cotangents: rows, columns, scale.
_Inputs = tuple[Array, Array, Array]
_PARTS = (Part(), Part(0), Part())
_Partials = tuple[Partial, Partial]
_Pull = Callable[[Float[Array, "n block"]], _Inputs]
_Directions = tuple[RowStatistics, RowStatistics]


def _fixed(x: Sides) -> Sides:
    """What has no derivative."""
    return x._replace(rows=ABSENT, columns=ABSENT, scale=ABSENT)


def _block(x: Sides, memory_budget: int | None, tiles: int) -> int:
    """Columns per block, if a block takes `tiles` arrays in the dtype of sums, and its gradient.

    The gradient is in the dtype of the rows. In a batch of symbolic size (`jax.export`) all columns
    are one block: how many blocks there would be is not known.
    """
    rows, columns = x.rows.shape[0], x.columns.shape[0]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return columns
    if memory_budget is None:
        memory_budget = block_sizes.default_budget(x.columns.size * x.columns.dtype.itemsize)
    pair_bytes = tiles * wide(x.rows.dtype).itemsize + x.rows.dtype.itemsize
    return block_sizes.class_block(rows, columns, pair_bytes, memory_budget)


def _inputs(x: Sides) -> _Inputs:
    return x.rows, x.columns, x.scale


def _logits(inputs: _Inputs) -> tuple[Float[Array, "n block"], _Pull]:
    """The logits of a block of columns, and what takes their cotangents back to the inputs.

    The scale multiplies the products in their wide dtype: rounded into narrow rows it would move
    every logit by as much as that rounding. A CPU may contract the product with the difference
    from the maximum, and in one of two programs only: where loss and gradient are compiled apart,
    outside `jit`, logits of 1e6 and more are then off by their last digit.
    """
    rows, columns, scale = inputs
    products, pull_products = products_of(Tokens(rows), Head(columns), 0)

    def pull(dz: Float[Array, "n block"]) -> _Inputs:
        tokens, head = pull_products(dz * scale)
        return tokens.hidden, head.kernel, jnp.sum(dz * products)

    return products * scale, pull


def _without(
    z: Float[Array, "n block"], counts: Bool[Array, " m"] | None, first: First
) -> Float[Array, "n block"]:
    """The logits with -inf in the columns that do not exist."""
    if counts is None:
        return z
    return jnp.where(take(counts, first, z.shape[1])[None], z, -jnp.inf)


def _nothing(x: Float[Array, "n width"], *, probs: bool = False, argmax: bool = False) -> Partial:
    """The statistics of each row over no columns, of a label or of a target distribution."""
    target = Target(probs=x) if probs else Target(labels=x)  # only which of them is given matters
    return tile.nothing_seen(x.shape[:1], wide(x.dtype), target, entropy=False, argmax=argmax)


def _not_empty(part: Partial) -> Partial:
    """The statistics, with a harmless normaliser in rows that had nothing to look at."""
    return part._replace(sum_exp=jnp.where(part.sum_exp == 0, 1, part.sum_exp))


def _of_cross(g: Float[Array, " n"]) -> RowStatistics:
    zero = jnp.zeros_like(g)
    return RowStatistics(lse=zero, cross=g, label_logit=zero)


# Logits, their target, and the id of the first class; and what makes them of a block.
_View = tuple[Float[Array, "_ _"], Target, First]
_ViewOf = Callable[[Float[Array, "n block"], Sides, First], _View]


def _by_row(z: Float[Array, "n block"], fixed: Sides, first: First) -> _View:
    """A block as rows of columns, with the label of each row."""
    labels = fixed.first + jnp.arange(z.shape[0], dtype=jnp.int32)
    return _without(z, fixed.column_counts, first), Target(labels=labels), first


def _by_column(z: Float[Array, "n block"], fixed: Sides, first: First) -> _View:
    """A block as columns of rows, likewise.

    The label of a column may be a row of another device: then it is not found in this block.
    """
    labels = first + jnp.arange(z.shape[1], dtype=jnp.int32)
    return _without(z.T, fixed.row_counts, 0), Target(labels=labels), fixed.first


def _read(view: _View, seen: tile.Seen = None, *, argmax: bool = False) -> Partial:
    z, target, first_class = view
    normaliser = _platform.normaliser(z, seen)
    return _platform.read(z, target, normaliser, argmax=argmax, first_class=first_class)


def _pulled_back(view: _View, part: Partial, g: RowStatistics) -> Float[Array, "_ _"]:
    z, target, first_class = view
    return tile.pullback(z, target, part, g, first_class=first_class)[0]


# A softmax over the columns.


def one_direction(x: Sides, *, memory_budget: int | None, forward_mode: bool) -> Float[Array, " n"]:
    """Cross-entropy of each row with its column: row `i` is paired with column `first + i`."""
    return _over_rows(x, _by_row, _block(x, memory_budget, 2), forward_mode=forward_mode)


def _over_rows(
    x: Sides, view: _ViewOf, block: int, *, probs: bool = False, forward_mode: bool
) -> Float[Array, " n"]:
    """The cross-entropy of each row, whose target is a label or a distribution."""
    form = Form(
        start=lambda inputs, *_: _nothing(inputs[0], probs=probs),
        fold=functools.partial(_fold_rows, view),
        across=_not_empty,
        finish=lambda part: tile.finish(part).cross,
        pull=functools.partial(_pull_rows, view),
        parts=_PARTS,
        columns=x.columns.shape[0],
        block=block,
    )
    return over_columns(form, _inputs(x), _fixed(x), forward_mode=forward_mode)


def _fold_rows(
    view: _ViewOf, inputs: _Inputs, fixed: Sides, sums: Partial, first: First
) -> Partial:
    z, _ = _logits(inputs)
    return merge(sums, _read(view(z, fixed, first), sums.base))


def _pull_rows(
    view: _ViewOf,
    inputs: _Inputs,
    fixed: Sides,
    sums: Partial,
    g: Array,
    first: First,
) -> _Inputs:
    z, pull = _logits(inputs)
    return pull(_pulled_back(view(z, fixed, first), sums, _of_cross(g)))


# Both directions. A block has all rows of its columns (on this device), so it completes their
# statistics, and adds to those of the rows.


def both_directions(
    x: Sides,
    *,
    argmax: bool,
    axis_name: str | None,
    memory_budget: int | None,
    forward_mode: bool,
) -> _Directions:
    """Statistics of each row, and of each column, of all devices; with `argmax` or without.

    Row `i` is paired with column `first + i`, its label. One matrix serves both.
    """
    form = Form(
        start=lambda inputs, *_: tuple(_nothing(x, argmax=argmax) for x in inputs[:2]),
        fold=functools.partial(_fold_both, argmax),
        across=functools.partial(_join_columns, axis_name),
        finish=lambda sums: tuple(map(tile.finish, sums)),
        pull=_pull_both,
        parts=_PARTS,
        columns=x.columns.shape[0],
        block=_block(x, memory_budget, 2),
        cotangents=lambda g: tuple(map(tile.cotangents, g)),
    )
    return over_columns(form, _inputs(x), _fixed(x), forward_mode=forward_mode)


def _fold_both(
    argmax: bool, inputs: _Inputs, fixed: Sides, sums: _Partials, first: First
) -> _Partials:
    z, _ = _logits(inputs)
    new = _read(_by_column(z, fixed, first), argmax=argmax)
    of_columns = jax.tree.map(lambda x, new: put(x, new, first), sums[1], new)
    of_rows = merge(sums[0], _read(_by_row(z, fixed, first), sums[0].base, argmax=argmax))
    return of_rows, of_columns


def _join_columns(axis_name: str | None, sums: _Partials) -> _Partials:
    of_rows, of_columns = sums
    return _not_empty(of_rows), _not_empty(sharded.merge_across(of_columns, axis_name))


def _pull_both(
    inputs: _Inputs,
    fixed: Sides,
    sums: _Partials,
    g: _Directions,
    first: First,
) -> _Inputs:
    z, pull = _logits(inputs)
    part, d = jax.tree.map(lambda x: take(x, first, z.shape[1]), (sums[1], g[1]))
    by_row = _pulled_back(_by_row(z, fixed, first), sums[0], g[0])
    return pull(by_row + _pulled_back(_by_column(z, fixed, first), part, d).T)


# Independent decisions: is this the row's column?

# As `_Inputs`, and a bias.
_Biased = tuple[Array, Array, Array, Array]


def decisions(
    x: Sides, bias: Float[Array, ""], *, memory_budget: int | None, forward_mode: bool
) -> Float[Array, " n"]:
    """For each row, the logistic losses of all its pairs together; `bias` is added to all logits.

    Row `i` is to be told from all columns but `first + i`.
    """
    form = Form(
        start=lambda inputs, *_: jnp.zeros(inputs[0].shape[0], wide(inputs[0].dtype)),
        fold=_fold_decisions,
        pull=_pull_decisions,
        parts=(*_PARTS, Part()),
        columns=x.columns.shape[0],
        block=_block(x, memory_budget, 3),
    )
    inputs = (*_inputs(x), bias)
    return over_columns(form, inputs, _fixed(x), forward_mode=forward_mode)


def _pair_losses(
    fixed: Sides, first: First, z: Float[Array, "n block"], *, forward_mode: bool
) -> Float[Array, "n block"]:
    rows = fixed.first + jnp.arange(z.shape[0], dtype=jnp.int32)
    z = _without(z, fixed.column_counts, first)  # the loss of a negative at -inf is 0
    y = is_label(rows, z, first).astype(z.dtype)
    return logistic.loss(z, y, forward_mode=forward_mode)


def _fold_decisions(inputs: _Biased, fixed: Sides, sums: Array, first: First) -> Float[Array, " n"]:
    z, _ = _logits(inputs[:3])
    return sums + jnp.sum(_pair_losses(fixed, first, z + inputs[3], forward_mode=True), -1)


def _pull_decisions(
    inputs: _Biased,
    fixed: Sides,
    sums: Array,
    g: Array,
    first: First,
) -> _Biased:
    z, pull = _logits(inputs[:3])
    losses = functools.partial(_pair_losses, fixed, first, forward_mode=False)
    _, pull_losses = jax.vjp(losses, z + inputs[3])
    (dz,) = pull_losses(jnp.broadcast_to(g[:, None], z.shape))
    return (*pull(dz), jnp.sum(dz))


# A softmax over all columns but the row itself, against the columns of the row's group.


def against_group(
    x: Sides, *, memory_budget: int | None, forward_mode: bool
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """Mean cross-entropy of each row with the others of its group, and whether there are any.

    Row `i` is the same thing as column `first + i`.
    """
    fixed = _fixed(x)
    columns, block = x.columns.shape[0], _block(x, memory_budget, 5)

    def count(total: Array, first: First, size: int) -> Array:
        return total + jnp.sum(_same(fixed, first, size)[0], -1, dtype=total.dtype)

    nobody = sharded.like(jnp.zeros(x.row_group.shape, jnp.int32), x.row_group)
    positives = over_blocks(count, nobody, columns, block)
    x = x._replace(positives=jnp.maximum(positives, 1).astype(wide(x.rows.dtype)))
    losses = _over_rows(x, _against_others, block, probs=True, forward_mode=forward_mode)
    return losses, positives > 0


def _same(
    fixed: Sides, first: First, size: int
) -> tuple[Bool[Array, "n block"], Bool[Array, "n block"]]:
    """Which columns are of the row's group, and which are others than the row at all."""
    rows = fixed.first + jnp.arange(fixed.row_group.shape[0], dtype=jnp.int32)
    columns = first + jnp.arange(size, dtype=jnp.int32)
    others = rows[:, None] != columns[None]
    if fixed.column_counts is not None:
        others = others & take(fixed.column_counts, first, size)[None]
    same = fixed.row_group[:, None] == take(fixed.column_group, first, size)[None]
    return same & others, others


def _against_others(z: Float[Array, "n block"], fixed: Sides, first: First) -> _View:
    """A block as rows of the other columns, of which those of the row's group are the target."""
    same, others = _same(fixed, first, z.shape[1])
    probs = jnp.where(same, 1 / fixed.positives[:, None], 0)
    return jnp.where(others, z, -jnp.inf), Target(probs=probs), first
