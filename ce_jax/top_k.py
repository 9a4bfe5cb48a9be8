r"""Distillation from a teacher of which k log-probabilities per row were stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.entries import Entries, entries
from ._arguments.layer import head_of, layer
from ._arguments.reductions import Reducer
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import class_blocks, sharded, tempered
from ._rows.dtypes import wide
from ._rows.order import as_given, in_order
from ._rows.tile import RowStatistics, Target
from ._rows.top_k import Tail, top_k_divergence


@reducible
def top_k_distillation_loss(
    logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    tail: Tail = "bucket",
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Divergence between student and a teacher of which k classes per row are known, in nats.

    With the student's :math:`p = \mathrm{softmax}(z / T)`, the stored ids :math:`c_1 \dots c_k`,
    the teacher's probabilities :math:`p'_i` of these classes at the same temperature, and the sums
    over all other classes :math:`p_r = 1 - \sum_i p_{c_i}` and :math:`p'_r = 1 - \sum_i p'_i`:

    .. math::
      \ell_\text{bucket} = T^2 \left(\sum_i p'_i \log \frac{p'_i}{p_{c_i}}
        + p'_r \log \frac{p'_r}{p_r}\right), \qquad
      \ell_\text{drop} = T^2 \sum_i p'_i \log \frac{p'_i}{p_{c_i}}

    "renormalize" is "drop" with :math:`p'_i / \sum_j p'_j` in place of :math:`p'_i`. "bucket" is
    the divergence of the two distributions in which all other classes together are one class. It is
    0 if the student agrees with the teacher. With "renormalize", the minimum is at a student that
    gives all other classes probability 0. "drop" may be negative, and its minimum is not at the
    teacher. :math:`p_r` is computed as a sum over the other classes, so loss and gradient are
    accurate also if the k classes have nearly all the probability.

    Loss and gradient take memory for a copy of the logits. With a temperature, or of narrow logits
    on a CPU, they take two copies in the dtype of the loss. `linear_top_k_distillation_loss` never
    holds more than a block of them.

    Gradients of the logits are :math:`T (p_c - p'_c)` for a stored class and, for "bucket",
    :math:`T p_c (1 - p'_r / p_r)` for another class. `teacher_log_probs` gets its true gradient as
    well.

    Args:
      logits: the student's logits `[..., C]`, floating; `-inf` marks a class that is not allowed.
      teacher_ids: class ids `[..., k]`, of any integer dtype; the ids of a row must differ. An id
        of -1 or `ignore_index` marks an absent entry.
      teacher_log_probs: the teacher's log-probabilities of these classes, of the same shape,
        floating; -inf stands for a probability of 0. For "renormalize" they may be logits.
      tail: "bucket", "renormalize" or "drop": how the classes that were not stored are treated.
      axis: the class axis of `logits`, a tuple of class axes (ids are then flat indices into these
        axes), or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      temperature: T, which divides the logits. A scalar or an array with the axes of the loss (size
        1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      ignore_index: another id of absent entries. A row without any entry does not count.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the class axis is sharded; ids
        are among all classes.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 if either floating array is float64).
      It is +inf where the teacher allows a class that the student does not allow. (With "bucket",
      a teacher has no other classes if the student has none and rounding, in the dtype of the
      log-probabilities, explains what their sum lacks of 1.) A row is NaN if an id is not a class
      or occurs twice, or if the log-probabilities are impossible by more than rounding can explain:
      one is above 0 or, for "bucket", the probabilities add up to more than 1.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis, a name or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> logits, ids = jnp.zeros((1, 4)), jnp.array([[2, 0]])
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.25]]))
      >>> for tail in ("bucket", "renormalize", "drop"):
      ...     print(ce_jax.top_k_distillation_loss(logits, ids, log_probs, tail=tail))
      [0.1733]
      [0.7498]
      [0.3466]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network`, 2015; of sampled and truncated
      teachers: Anshumann et al., `Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs`, 2025.
    """
    checks.one_of("tail", tail, get_args(Tail))
    return _top_k(
        logits,
        teacher_ids,
        teacher_log_probs,
        where,
        options.temperature(temperature),
        sample_weight,
        axis=checks.static_axis(axis),
        tail=tail,
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def _top_k(
    logits: Array,
    teacher_ids: Array,
    teacher_log_probs: Array,
    where: Array | None,
    temperature: Array | None,
    sample_weight: Array | None,
    *,
    axis: Axes,
    tail: Tail,
    ignore_index: int | None,
    axis_name: str | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    student = targets.rows_of("logits", logits, axis, where, axis_name)
    *shape, local = student.values.shape
    rows, classes = tuple(shape), sharded.all_classes(local, axis_name)
    teacher = entries(
        teacher_ids, teacher_log_probs, student.values, classes, student.counts, ignore_index
    )
    weights = reductions.weights(sample_weight, rows, teacher.log_probs.dtype)
    if weights is not None:
        weights = sharded.rows_like(weights, student.values)
    z = targets.without_excluded(student.values, teacher.counts, weights, axis_name)
    temperature = options.row_temperature(temperature, rows, wide(z.dtype), teacher.counts)
    found = tempered.row_statistics(
        z,
        Target(picked=teacher.ids),
        None,
        temperature,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    loss = _loss(found, teacher, temperature, weights, tail)
    return reductions.reduce(loss, teacher.counts, weights, reduction)


def _loss(
    found: RowStatistics,
    teacher: Entries,
    temperature: Float[Array, "*rows"] | None,
    weights: Float[Array, "*rows"] | None,
    tail: Tail,
) -> Float[Array, "*rows"]:
    """Rows that do not count, or weigh nothing and have no finite loss, reach no derivative."""
    log_probs = teacher.log_probs
    found = found._replace(
        lse=found.lse.astype(log_probs.dtype), picked=found.picked.astype(log_probs.dtype)
    )

    def divergence(mute: Array) -> Array:
        ours, theirs = _harmless(mute, found, log_probs)
        if tail != "renormalize":
            theirs = options.log_probability("teacher_log_probs", theirs)
        return jnp.where(mute, 0, top_k_divergence(ours, theirs, teacher.rounding, tail))

    mute = ~teacher.counts
    if weights is not None:
        mute = mute | (weights == 0) & ~jnp.isfinite(divergence(mute))
    loss = divergence(mute)
    loss = targets.nan_if(teacher.unknown | jnp.isnan(loss), loss, weights)
    return loss if temperature is None else loss * jnp.square(temperature.astype(loss.dtype))


def _harmless(
    mute: Array, found: RowStatistics, log_probs: Float[Array, "*rows k"]
) -> tuple[RowStatistics, Float[Array, "*rows k"]]:
    picked = jnp.where(mute[..., None], 0, found.picked)
    even = -jnp.log(2.0 * log_probs.shape[-1])
    log_probs = jnp.where(mute[..., None], even.astype(log_probs.dtype), log_probs)
    return found._replace(lse=jnp.where(mute, 0, found.lse), picked=picked), log_probs


@reducible
def linear_top_k_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    tail: Tail = "bucket",
    bias: ArrayLike | None = None,
    class_axis: int = -1,
    num_classes: int | None = None,
    logit_soft_cap: Scalar | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Distillation of a linear layer's softmax from k classes per row, without logits in memory.

    For hidden states :math:`h`, kernel :math:`W` and bias :math:`b`, the loss is that of
    `top_k_distillation_loss`, option by option, on

    .. math::
      z = \mathrm{cap} \tanh\!\left(\frac{h W + b}{\mathrm{cap}}\right)
      \qquad (z = h W + b \text{ without a cap})

    The logits are computed in blocks of classes, once for the loss and once more for the gradient.
    The logits of the k classes are read from these blocks; columns of the kernel are not gathered.
    Rows without any entry and rows that do not count cost next to nothing.

    Args:
      hidden: `[..., D]`, floating.
      kernel: `[D, V]`, or `[V, D]` with `class_axis=0`, of the dtype of `hidden` or a wider one.
      teacher_ids: class ids `[..., k]`, of any integer dtype; the ids of a row must differ. An id
        of -1 or `ignore_index` marks an absent entry.
      teacher_log_probs: the teacher's log-probabilities of these classes, of the same shape,
        floating, at the same temperature. For "renormalize" they may be logits.
      tail: "bucket", "renormalize" or "drop", as in `top_k_distillation_loss`.
      bias: `[V]`. A bias of -inf bans a class.
      class_axis: the axis of `kernel` that holds the classes.
      num_classes: number of classes; further classes of `kernel` are padding, which is ignored. By
        default there is no padding.
      logit_soft_cap: positive bound of the logits. May be traced.
      temperature: T, which divides the logits, in float32, after bias and soft cap. A scalar or an
        array with the axes of the loss (size 1 broadcasts). At least 1e-6. May be traced.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      where: bool, a scalar or an array with the axes of the loss (size 1 broadcasts): rows to
        include, such as `next_tokens(...).where`.
      ignore_index: another id of absent entries. A row without any entry does not count.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which `kernel` and `bias` are
        sharded by classes; ids are among all classes.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      memory_budget: bytes that a block of logits and its gradient may take, by default as in
        `linear_softmax_cross_entropy`.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 if an input is); +inf and NaN as in
      `top_k_distillation_loss`.

    Raises:
      TypeError: for a dtype or type that does not fit, such as a `hidden` wider than `kernel`.
      ValueError: for a shape, an axis, a name or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> hidden, kernel, ids = jnp.ones((1, 3)), jnp.zeros((3, 4)), jnp.array([[2, 0]])
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.25]]))
      >>> print(ce_jax.linear_top_k_distillation_loss(hidden, kernel, ids, log_probs))
      [0.1733]

    References:
      See `top_k_distillation_loss`.
    """
    checks.one_of("tail", tail, get_args(Tail))
    return _linear_top_k(
        hidden,
        kernel,
        teacher_ids,
        teacher_log_probs,
        bias,
        options.soft_cap("logit_soft_cap", logit_soft_cap),
        options.temperature(temperature),
        sample_weight,
        where,
        tail=tail,
        class_axis=checks.int_option("class_axis", class_axis),
        num_classes=checks.integer_option("num_classes", num_classes),
        ignore_index=checks.integer_option("ignore_index", ignore_index),
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _linear_top_k(
    hidden: Array,
    kernel: Array,
    teacher_ids: Array,
    teacher_log_probs: Array,
    bias: Array | None,
    logit_soft_cap: Array | None,
    temperature: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    *,
    tail: Tail,
    class_axis: int,
    num_classes: int | None,
    ignore_index: int | None,
    axis_name: str | None,
    reduction: Reducer,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss:
    hidden, head, class_axis = head_of(hidden, kernel, bias, logit_soft_cap, class_axis)
    rows, held = hidden.shape[:-1], sharded.all_classes(head.kernel.shape[class_axis], axis_name)
    where = checks.mask(where, rows, "the rows of hidden")
    classes = checks.class_count(num_classes, held)
    teacher = entries(teacher_ids, teacher_log_probs, hidden, classes, where, ignore_index)
    x = layer(
        hidden,
        head,
        class_axis,
        None,
        temperature,
        teacher.counts,
        num_classes=num_classes,
        ignore_index=None,
        axis_name=axis_name,
        memory_budget=memory_budget,
        summed=False,
        statistics=False,
        picked=True,
    )
    weights = reductions.weights(sample_weight, rows, teacher.log_probs.dtype)
    by_row = (teacher, weights)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(rows) :]), by_row)
    teacher, of_row = in_order(x.order, flat)
    tokens = x.tokens._replace(hidden=targets.without_silent(x.tokens.hidden, of_row))
    target = Target(picked=teacher.ids)
    found = class_blocks.row_statistics(
        x.options, tokens, x.head, target, x.counting, forward_mode=forward_mode
    )
    loss = as_given(x.order, _loss(found, teacher, tokens.temperature, of_row, tail))
    return reductions.reduce(loss.reshape(rows), by_row[0].counts, weights, reduction)
