"""Row statistics of `hidden @ kernel` in blocks of classes, which the backward pass recomputes.

Never more than one block of logits and of its gradient exist. Four matmuls of the size of the whole
product in all (`8 N D V` operations for value and gradient); any cotangent is served.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _platform
from .._platform import block_sizes
from . import sharded, tile
from .head import Head, Pull, logits, over_blocks, put, read_by_all, take, take_classes
from .tile import ABSENT, First, Partial, Target, merge


class Options(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      block: classes per block.
      class_axis: the axis of the kernel that holds the classes.
      classes: how many classes there are; what the kernels of all devices hold beyond is padding.
      axis_name: mapped mesh axis over which the classes are sharded.
      entropy: whether the entropy is wanted.
      argmax: whether the argmax is wanted.
    """

    block: int
    class_axis: int
    classes: int
    axis_name: str | None = None
    entropy: bool = False
    argmax: bool = False


def row_statistics(
    options: Options,
    hidden: Float[Array, "tokens width"],
    head: Head,
    target: Target,
    *,
    forward_mode: bool = False,
) -> tile.RowStatistics:
    """Statistics of each row of the logits, differentiable but for `argmax`."""
    sharded.check_sharded("kernel", head.kernel, options.axis_name)
    hidden, head, target = sharded.align((hidden, head, target))
    if forward_mode:
        return tile.finish(_partial(options, hidden, head, target))
    return _fused(options, hidden, head, target)


def block_logits(
    options: Options, hidden: Float[Array, "tokens width"], head: Head, first: First, size: int
) -> tuple[Float[Array, "tokens classes"], Pull]:
    """Logits of `size` classes from `first` on, and their pull-back.

    Classes that are padding get -inf: a logit of 0 would count in the sum. What the head holds
    there is set to 0, as 0 times padding that is not finite would be NaN.
    """
    block = take_classes(head, first, size, options.class_axis)
    if not _padded(options, head):
        return logits(hidden, block, options.class_axis)
    ids = jnp.arange(size, dtype=jnp.int32) + _first_class(options, head, first)
    real = ids < options.classes
    block = block._replace(
        kernel=jnp.where(jnp.expand_dims(real, 1 - options.class_axis), block.kernel, 0),
        bias=ABSENT if block.bias is None else jnp.where(real, block.bias, 0),
    )
    z, pull = logits(hidden, block, options.class_axis)
    return jnp.where(real[None], z, -jnp.inf), pull


def _padded(options: Options, head: Head) -> bool:
    """Whether a block may hold padding. Devices differ in theirs; one device leaves it out."""
    local = head.kernel.shape[options.class_axis]
    spread = options.axis_name is not None
    return spread and options.classes < sharded.all_classes(local, options.axis_name)


def _first_class(options: Options, head: Head, first: First) -> First:
    local = head.kernel.shape[options.class_axis]
    return sharded.first_class(local, options.axis_name) + first


def _target_of(target: Target, first: First, size: int) -> Target:
    if target.classes is None or target.classes.ndim == 0:
        return target
    return target._replace(classes=take(target.classes, first, size))


def _visited(options: Options, head: Head) -> int:
    """How many of the local classes to visit: without an axis name, padding is left out."""
    return options.classes if options.axis_name is None else head.kernel.shape[options.class_axis]


def _partial(options: Options, hidden: Array, head: Head, target: Target) -> Partial:
    hidden_of_block = read_by_all(hidden)

    def of_block(first: First, size: int) -> Partial:
        z, _ = block_logits(options, hidden_of_block(), head, first, size)
        return _platform.read(
            z,
            _target_of(target, first, size),
            _platform.normaliser(z),
            entropy=options.entropy,
            argmax=options.argmax,
            first_class=_first_class(options, head, first),
        )

    def step(part: Partial, first: First, size: int) -> Partial:
        return merge(part, of_block(first, size))

    total = _visited(options, head)
    like = jax.eval_shape(lambda: of_block(0, block_sizes.cut(total, options.block).size))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    nothing = nothing._replace(base=jnp.full_like(nothing.base, -jnp.inf))
    part = over_blocks(step, sharded.like(nothing, hidden), total, options.block)
    return sharded.merge_across(part, options.axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options: Options, hidden: Array, head: Head, target: Target) -> tile.RowStatistics:
    return tile.finish(_partial(options, hidden, head, target))


_Residuals = tuple[Array, Head, Target, Partial]


def _fused_fwd(
    options: Options, hidden: Array, head: Head, target: Target
) -> tuple[tile.RowStatistics, _Residuals]:
    part = _partial(options, hidden, head, target)
    return tile.finish(part), (hidden, head, target, part)


def _fused_bwd(
    options: Options, residuals: _Residuals, g: tile.RowStatistics
) -> tuple[Array, Head, Target]:
    return _pulled_back(options, residuals, g._replace(argmax=ABSENT))


# As a whole for those who differentiate outside `jit`, where loops would be compiled in each call.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _pulled_back(
    options: Options, residuals: _Residuals, g: tile.RowStatistics
) -> tuple[Array, Head, Target]:
    hidden, head, target, part = residuals
    hidden_of_block = read_by_all(hidden)

    def step(carry: tuple[Array, Head, Any], first: First, size: int) -> tuple[Array, Head, Any]:
        d_hidden, d_head, d_classes = carry
        z, pull = block_logits(options, hidden_of_block(), head, first, size)
        first_class = _first_class(options, head, first)
        of_block = _target_of(target, first, size)
        dz, d_target = tile.pullback(z, of_block, part, g, first_class=first_class)
        more_hidden, block = pull(dz)
        d_head = Head(
            kernel=put(d_head.kernel, block.kernel, first, options.class_axis),
            bias=ABSENT if head.bias is None else put(d_head.bias, block.bias, first),
            soft_cap=ABSENT if head.soft_cap is None else d_head.soft_cap + block.soft_cap,
        )
        if d_classes is not None:
            of_all = d_classes.ndim == 0
            d_classes = (
                d_classes + d_target.classes if of_all else put(d_classes, d_target.classes, first)
            )
        return d_hidden + more_hidden, d_head, d_classes

    zeros = jnp.zeros(hidden.shape[::-1], tile.wide(hidden.dtype))
    carry = (zeros, *jax.tree.map(jnp.zeros_like, (head, target.classes)))
    d_hidden, d_head, d_classes = over_blocks(
        step, sharded.like(carry, hidden), _visited(options, head), options.block
    )
    return d_hidden.T.astype(hidden.dtype), d_head, Target(classes=d_classes)


_fused.defvjp(_fused_fwd, _fused_bwd)
