"""Row statistics of `hidden @ kernel` in blocks of classes, which the backward pass recomputes.

Never more than one block of logits and of its gradient exist. Four matmuls of the size of the whole
product in all (`8 N D V` operations for value and gradient); any cotangent is served. The loop and
its derivative are those of `columns`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import _platform
from . import columns, sharded, tile
from .columns import Form, Part, over_columns
from .dtypes import wide
from .head import Head, Pull, Tokens, logits
from .order import Counting
from .picked import First, pick
from .tile import ABSENT, Partial, Target, merge


class Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      block: classes per block.
      class_axis: the axis of the kernel that holds the classes.
      classes: how many classes there are; what the kernels of all devices hold beyond is padding.
      local: how many classes of this device to visit.
      axis_name: mapped mesh axis over which the classes are sharded.
      statistics: whether entropy and argmax are wanted, too.
      tile: rows per tile, where not all rows count.
    """

    block: int
    class_axis: int
    classes: int
    local: int
    axis_name: str | None = None
    statistics: bool = False
    tile: int = 0


def row_statistics(
    options: Options,
    tokens: Tokens,
    head: Head,
    target: Target,
    counting: Counting = None,
    *,
    forward_mode: bool = False,
) -> tile.RowStatistics:
    """Statistics of each row of the logits, differentiable but for `argmax`.

    Those of rows that do not count have no meaning.
    """
    sharded.check_sharded("kernel", head.kernel, options.axis_name)
    form, inputs, by_row = _form(options, tokens, head, target)
    return over_columns(form, inputs, by_row, counting, forward_mode=forward_mode)


class _Inputs(NamedTuple):
    """What the statistics are differentiable by, or cotangents of it."""

    tokens: Tokens
    head: Head
    classes: Any


Residuals = tuple[Tokens, Head, Target, Counting, Any]


def pulled_back(
    options: Options, residuals: Residuals, g: tile.RowStatistics
) -> tuple[Tokens, Head, Any]:
    """Cotangents of tokens, head and class coefficients, given those of the statistics."""
    tokens, head, target, counting, part = residuals
    form, inputs, by_row = _form(options, tokens, head, target)
    return columns.pulled_back(form, (inputs, by_row, counting, part), g)


def _form(
    options: Options, tokens: Tokens, head: Head, target: Target
) -> tuple[Form, _Inputs, Target]:
    """The form, what it is differentiated by, and the part of the target that is by row."""
    classes = target.classes
    form = Form(
        start=functools.partial(_start, options),
        fold=functools.partial(_fold, options),
        across=functools.partial(sharded.merge_across, axis_name=options.axis_name),
        finish=tile.finish,
        pull=functools.partial(_pull, options),
        parts=_Inputs(
            jax.tree.map(lambda x: Part(by_row=True), tokens),
            head_parts(head, options.class_axis, tokens.hidden.dtype),
            None if classes is None else Part(0 if classes.ndim else None),
        ),
        columns=options.local,
        block=options.block,
        rows=tokens.hidden.shape[0],
        tile=options.tile,
        cotangents=tile.cotangents,
    )
    return form, _Inputs(tokens, head, classes), target._replace(classes=ABSENT)


def head_parts(head: Head, class_axis: int, dtype: DTypeLike) -> Any:
    """What a block of classes reads of a head: its kernel cast once for all tiles of rows."""
    parts = Part(class_axis, dtype=dtype), Part(0), Part()
    given: Any = [None if x is None else part for x, part in zip(head, parts, strict=True)]
    return Head(*given)


def block_logits(
    options: Options, tokens: Tokens, head: Head, first: First
) -> tuple[Float[Array, "tokens classes"], Pull]:
    """Logits of a block of classes from `first` on, and their pull-back.

    The kernel of a class that is padded is taken as 0, as 0 times padding that is not finite would
    be NaN. Its logit is -inf: one of 0 would count in the sum.
    """
    size = head.kernel.shape[options.class_axis]
    real = sharded.real_classes(size, first, options.classes, options.local, options.axis_name)
    if real is None:
        return logits(tokens, head, options.class_axis)
    head = head._replace(
        kernel=jnp.where(jnp.expand_dims(real, 1 - options.class_axis), head.kernel, 0),
        bias=ABSENT if head.bias is None else jnp.where(real, head.bias, 0),
    )
    z, pull = logits(tokens, head, options.class_axis)
    return jnp.where(real[None], z, -jnp.inf), pull


def _first_class(options: Options, first: First) -> First:
    return sharded.first_class(options.local, options.axis_name) + first


def _start(options: Options, inputs: _Inputs, by_row: Target, _: Counting) -> Partial:
    hidden, wanted = inputs.tokens.hidden, options.statistics
    target = by_row._replace(classes=inputs.classes)
    dtype = wide(hidden.dtype)
    return tile.nothing_seen(hidden.shape[:1], dtype, target, entropy=wanted, argmax=wanted)


def _fold(
    options: Options, inputs: _Inputs, by_row: Target, seen: Partial, first: First
) -> Partial:
    z, _ = block_logits(options, inputs.tokens, inputs.head, first)
    first_class = _first_class(options, first)
    z, picked = pick(z, by_row.picked, first_class)
    new = _platform.read(
        z,
        by_row._replace(classes=inputs.classes),
        _platform.normaliser(z, seen.base),
        entropy=options.statistics,
        argmax=options.statistics,
        first_class=first_class,
    )
    return merge(seen, new._replace(picked=picked))


def _pull(
    options: Options,
    inputs: _Inputs,
    by_row: Target,
    part: Partial,
    g: tile.RowStatistics,
    first: First,
) -> _Inputs:
    z, pull = block_logits(options, inputs.tokens, inputs.head, first)
    target = by_row._replace(classes=inputs.classes)
    first_class = _first_class(options, first)
    dz, d_target = tile.pullback(z, target, part, g, first_class=first_class)
    return _Inputs(*pull(dz), d_target.classes)
