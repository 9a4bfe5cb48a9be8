"""Arguments of distillation: checked, in rows, divided into blocks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._platform import block_sizes
from .._rows import class_blocks, sharded
from .._rows.divergence import Options, Side
from .._rows.dtypes import wide
from .._rows.order import Counting, Order, in_order, in_tiles, order_of
from . import checks, options, reductions, targets
from .compiled import array
from .layer import head_of
from .types import ArrayLike

# Bytes of such arrays that are not worth a loop over blocks (see `block_of_logits`).
_AT_ONCE = 256 * 10**6


class GivenLayer(NamedTuple):
    """The arguments of a linear layer, as given."""

    hidden: ArrayLike
    kernel: ArrayLike
    bias: ArrayLike | None
    soft_cap: ArrayLike | None


class TwoHeads(NamedTuple):
    """Student and teacher, their rows in one axis, and 0 in rows that do not count.

    Where both are layers, rows that count come first. To bring logits into order would copy them.

    Attributes:
      student: its layer.
      teacher: its layer or its logits.
      options: how to read both, with the teacher as the first.
      rows: the shape of the loss.
      dtype: that of the loss.
      counts: which rows count; None if nothing excludes any.
      used: those of them whose loss has an effect, in one axis; None if nothing excludes any.
      order: the order of the rows in this axis; None for that of the arguments.
      weights: sample weights; None if there are none.
    """

    student: Side
    teacher: Side
    options: Options
    rows: tuple[int, ...]
    dtype: jnp.dtype
    counts: Bool[Array, "*rows"] | None
    used: Bool[Array, " tokens"] | None
    order: Order | None
    weights: Float[Array, "*rows"] | None

    @property
    def counting(self) -> Counting:
        """How many rows count; None for all."""
        return None if self.order is None else self.order.counting


class _Checked(NamedTuple):
    """One side, how many classes it holds locally, on which axis, and bytes it takes for each."""

    side: Side
    rows: tuple[int, ...]
    local: int
    class_axis: int
    logit_bytes: int
    kernel_bytes: int


def given_layers(
    student: tuple[Any, Any, Any, Any], teacher: tuple[Any, Any, Any, Any], logits: Any
) -> tuple[GivenLayer, GivenLayer | None]:
    """Both layers, given hidden states, kernel, bias and soft cap; None for a teacher's logits."""

    def layer(prefix: str, hidden: Any, kernel: Any, bias: Any, soft_cap: Any) -> GivenLayer:
        cap = options.soft_cap(f"{prefix}logit_soft_cap", soft_cap)
        return GivenLayer(
            array(f"{prefix}hidden", hidden),
            array(f"{prefix}kernel", kernel),
            array(f"{prefix}bias", bias),
            cap,
        )

    has_layer = teacher[0] is not None and teacher[1] is not None
    if has_layer == (logits is not None) or (not has_layer and any(x is not None for x in teacher)):
        raise ValueError(
            "the teacher must be given either by teacher_logits alone, or by teacher_hidden and "
            "teacher_kernel, with or without teacher_bias and teacher_logit_soft_cap"
        )
    return layer("", *student), layer("teacher_", *teacher) if has_layer else None


def two_heads(
    student: GivenLayer,
    teacher: GivenLayer | None,
    teacher_logits: ArrayLike | None,
    where: ArrayLike | None,
    sample_weight: ArrayLike | None,
    *,
    class_axis: int,
    teacher_class_axis: int,
    num_classes: int | None,
    axis_name: str | None,
    memory_budget: int | None,
) -> TwoHeads:
    """Checks the arguments and divides the work."""
    s = _layer("", student, class_axis, axis_name)
    if teacher is not None:
        name, t = "teacher_hidden", _layer("teacher_", teacher, teacher_class_axis, axis_name)
    else:
        if teacher_class_axis != -1:
            raise ValueError(
                "teacher_class_axis is an axis of teacher_kernel; the classes of teacher_logits "
                "are in the last axis"
            )
        name, t = "teacher_logits", _teacher_logits(teacher_logits, axis_name)
    if t.rows != s.rows:
        raise ValueError(f"{name} must have the rows of hidden, {s.rows}, got {t.rows}")
    held = [sharded.all_classes(x.local, axis_name) for x in (s, t)]
    if s.local != t.local and (num_classes is None or axis_name is not None):
        raise ValueError(
            f"{'teacher_logits' if teacher is None else 'teacher_kernel'} must have as many "
            f"classes as kernel, {s.local}, got {t.local}; if one of them is padded, write "
            "num_classes= (without axis_name)"
        )
    classes = checks.class_count(num_classes, min(held))

    dtype = wide(*(x.side.rows.dtype for x in (s, t)))
    counts = checks.mask(where, s.rows, "the rows of hidden")
    weights = reductions.weights(sample_weight, s.rows, dtype)
    used = None if counts is None else counts.ravel()
    if weights is not None:  # a row of weight 0 that is not finite has no effect
        finite = [_finite(x.side, classes, axis_name) for x in (s, t)]
        used = checks.both(used, (weights.ravel() != 0) | finite[0] & finite[1])

    if memory_budget is None:
        memory_budget = block_sizes.default_budget(s.kernel_bytes + t.kernel_bytes)
    tokens, local = s.side.rows.shape[0], s.local if axis_name is not None else classes
    order, tile = None, block_sizes.rows(tokens)
    if counts is not None and used is not None and teacher is not None and in_tiles(tokens, tile):
        local_rows = map(sharded.is_local, (s.side.rows, t.side.rows, used))
        order = order_of(used, tile) if all(local_rows) else None
    at_once = tokens if order is None else -(-tokens // 2)
    pair_bytes = s.logit_bytes + t.logit_bytes
    block = block_sizes.class_block(at_once, local, pair_bytes, memory_budget)
    of_teacher, of_student = (
        class_blocks.Options(
            block=block,
            class_axis=x.class_axis,
            classes=classes,
            local=local,
            axis_name=axis_name,
            tile=tile,
        )
        for x in (t, s)
    )
    sides = [
        x.side._replace(rows=in_order(order, targets.without_excluded(x.side.rows, used)))
        for x in (s, t)
    ]
    used = in_order(order, used)
    return TwoHeads(
        student=sides[0],
        teacher=sides[1],
        options=Options(of_teacher, of_student),
        rows=s.rows,
        dtype=dtype,
        counts=counts,
        used=used,
        order=order,
        weights=weights,
    )


def _layer(prefix: str, x: GivenLayer, class_axis: int, axis_name: str | None) -> _Checked:
    hidden, head, class_axis = head_of(*x, class_axis, prefix)
    kernel, dtype, rows = head.kernel, wide(hidden.dtype), hidden.shape[:-1]
    sharded.check_sharded(f"{prefix}kernel", kernel, axis_name)
    steps = (x.bias is not None) + (x.soft_cap is not None)
    logit_bytes = dtype.itemsize * (2 + steps) + hidden.dtype.itemsize
    side = Side(hidden.reshape(-1, hidden.shape[-1]), head)
    kernel_bytes = kernel.size * hidden.dtype.itemsize
    return _Checked(side, rows, kernel.shape[class_axis], class_axis, logit_bytes, kernel_bytes)


def _teacher_logits(x: Any, axis_name: str | None) -> _Checked:
    z = checks.floating("teacher_logits", x)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"teacher_logits must have shape [..., V] with V > 0, got {z.shape}")
    sharded.check_sharded("teacher_logits", z, axis_name)
    rows, local = z.shape[:-1], z.shape[-1]
    logit_bytes = 2 * wide(z.dtype).itemsize + z.dtype.itemsize
    return _Checked(Side(z.reshape(-1, local)), rows, local, 1, logit_bytes, 0)


def block_of_logits(student: Array, teacher: Array) -> int:
    """Classes per block for the Jensen-Shannon divergence of two arrays of logits.

    Beside the mixture XLA for a CPU stores six arrays of the size of the logits, in the dtype of
    the loss, and XLA for a GPU in one block even more. So of many logits there are blocks.
    """
    *rows, local = student.shape
    logit_bytes = 6 * wide(student.dtype, teacher.dtype).itemsize
    own = all(map(sharded.is_own, (student, teacher)))
    if not own or student.size * logit_bytes <= _AT_ONCE:
        return local
    budget = block_sizes.default_budget(student.nbytes)
    return block_sizes.class_block(math.prod(rows), local, logit_bytes, budget)


def _finite(side: Side, classes: int, axis_name: str | None) -> Bool[Array, " tokens"]:
    """Where there is a softmax; logits may be -inf, and padding may be anything."""
    if side.head is not None:
        return jnp.all(jnp.isfinite(side.rows), -1)
    z = sharded.without_padding(side.rows, 0, classes, side.rows.shape[-1], axis_name)
    return jnp.isfinite(sharded.max_over(targets.largest(z), axis_name))
