r"""Distillation: the divergence between the softmax of a teacher and that of a student."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks, options, reductions, targets
from ._arguments.compiled import compiled
from ._arguments.reductions import Reducer
from ._arguments.two_heads import GivenLayer, block_of_logits, given_layers, two_heads
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from ._rows import class_blocks, sharded
from ._rows.divergence import Inputs, Options, Side, Used, divergence
from ._rows.dtypes import wide
from ._rows.jensen_shannon import jensen_shannon
from ._rows.numerics import silenced
from ._rows.order import Counting, as_given, in_order


@reducible
def distillation_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    reverse: bool = False,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Kullback-Leibler divergence between the softmax of a teacher and of a student, in nats.

    With logits z of the student, z' of the teacher, and a temperature T:

    .. math::
      \ell = T^2 \sum_c p'_c \log \frac{p'_c}{p_c}, \qquad
      p = \mathrm{softmax}(z / T), \quad p' = \mathrm{softmax}(z' / T)

    With `reverse`, p and p' are exchanged. The factor :math:`T^2` keeps the size of the gradients
    the same at any temperature. The loss is right to the rounding of log-probabilities, 5e-7 nats
    in float32, and the gradient to that of probabilities. The gradient with respect to the
    student's logits is :math:`T (p - p')`. The teacher's logits get their true gradient: apply
    `jax.lax.stop_gradient` to the teacher if it must not learn.

    Args:
      logits: the student's logits `[..., C]`, floating; `-inf` marks a class that is not allowed.
      teacher_logits: the teacher's logits, of the same shape and of any floating dtype.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
      temperature: T, which divides the logits of both. A scalar or an array with the axes of the
        loss (size 1 broadcasts). At least 1e-6. May be traced.
      reverse: exchange p and p'. The student then concentrates on a mode of the teacher instead of
        covering all modes.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the class axis of both arrays
        is sharded.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 if either array is float64). It is
      +inf where the teacher allows a class that the student does not allow (with `reverse`: the
      other way round).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.75, 0.25]))
      >>> print(ce_jax.distillation_loss(student, teacher))
      0.1308

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network`, 2015; reverse: Gu et al.,
      `MiniLLM: Knowledge Distillation of Large Language Models`, 2024.
    """
    return of_logits(
        logits,
        teacher_logits,
        where,
        options.temperature(temperature),
        None,
        sample_weight,
        axis=checks.static_axis(axis),
        reverse=reverse,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


@compiled
def of_logits(
    logits: Array,
    teacher_logits: Array,
    where: Array | None,
    temperature: Array | None,
    beta: Array | None,
    sample_weight: Array | None,
    *,
    axis: Axes,
    reverse: bool,
    axis_name: str | None,
    reduction: Reducer,
    forward_mode: bool,
) -> Loss:
    """The divergence of two arrays of logits.

    That of Kullback and Leibler or, with `beta`, of Jensen and Shannon.
    """
    student = targets.rows_of("logits", logits, axis, where, axis_name)
    teacher_logits = checks.floating("teacher_logits", teacher_logits)
    checks.shape_is("teacher_logits", teacher_logits, logits.shape, "that of logits")
    teacher_logits = sharded.with_sharding_of(teacher_logits, logits)
    teacher = targets.rows_of("teacher_logits", teacher_logits, axis, where, axis_name)
    *rows, local = student.values.shape
    dtype = wide(student.values.dtype, teacher.values.dtype)
    weights = reductions.weights(sample_weight, tuple(rows), dtype)
    for name, x in (("logits", student), ("teacher_logits", teacher)):
        sharded.check_sharded(name, x.values, axis_name)
    of_student, of_teacher = (
        Side(targets.without_excluded(x.values, x.counts, weights, axis_name))
        for x in (student, teacher)
    )
    block = local
    if beta is not None:
        block, beta = block_of_logits(student.values, teacher.values), beta.astype(dtype)
    side = class_blocks.Options(
        block=block,
        class_axis=-1,
        classes=sharded.all_classes(local, axis_name),
        local=local,
        axis_name=axis_name,
    )
    loss = _loss(
        Options(side, side),
        of_student,
        of_teacher,
        temperature=options.row_temperature(temperature, tuple(rows), dtype, student.counts),
        beta=beta,
        sample_weight=weights,
        reverse=reverse,
        forward_mode=forward_mode,
    )
    return reductions.reduce(loss, student.counts, weights, reduction)


def _loss(
    both: Options,
    student: Side,
    teacher: Side,
    *,
    temperature: Float[Array, "*rows"] | None,
    beta: Array | None,
    sample_weight: Float[Array, "*rows"] | None,
    reverse: bool,
    forward_mode: bool,
    used: Used = None,
    counting: Counting = None,
) -> Float[Array, "*rows"]:
    """The options in `both` are those of the teacher and of the student."""
    if reverse:
        both, student, teacher = both._replace(p=both.q, q=both.p), teacher, student
    inputs = Inputs(teacher, student, temperature)
    if beta is None:
        loss = divergence(both, inputs, used, counting, forward_mode=forward_mode)
    else:
        inputs = inputs._replace(share=beta)
        loss = jensen_shannon(both, inputs, used, counting, forward_mode=forward_mode)
    if temperature is None:
        return loss
    return silenced(sample_weight, loss) * jnp.square(temperature)


@reducible
def linear_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    *,
    teacher_logits: ArrayLike | None = None,
    teacher_hidden: ArrayLike | None = None,
    teacher_kernel: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    class_axis: int = -1,
    teacher_class_axis: int = -1,
    num_classes: int | None = None,
    logit_soft_cap: Scalar | None = None,
    teacher_logit_soft_cap: Scalar | None = None,
    temperature: ArrayLike = 1.0,
    reverse: bool = False,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Distillation of a linear layer's softmax, without its logits in memory.

    .. math::
      \ell = T^2 \sum_c p'_c \log \frac{p'_c}{p_c}, \qquad
      p = \mathrm{softmax}\!\left(\frac{h W + b}{T}\right), \quad
      p' = \mathrm{softmax}\!\left(\frac{h' W' + b'}{T}\right)

    This is `distillation_loss` of the logits of `linear_softmax_cross_entropy`. The teacher's
    logits come from its own linear layer or are given. The logits are computed in blocks of
    classes, once for the loss and once more for the gradient. The teacher gets its true gradient,
    which costs nothing if it is not used.

    Args:
      hidden: the student's hidden states `[..., D]`, floating.
      kernel: the student's kernel `[D, V]`, or `[V, D]` with `class_axis=0`, of the dtype of
        `hidden` or a wider one.
      teacher_logits: the teacher's logits `[..., V]`, of any floating dtype. Give either these or:
      teacher_hidden: the teacher's hidden states `[..., D']`, floating, and
      teacher_kernel: its kernel `[D', V]`, or `[V, D']` with `teacher_class_axis=0`.
      bias: `[V]`, of the student.
      teacher_bias: `[V]`, of the teacher.
      class_axis: the axis of `kernel` that holds the classes.
      teacher_class_axis: the axis of `teacher_kernel` that holds the classes.
      num_classes: number of classes; further classes of kernels and logits are padding, which is
        ignored. Student and teacher may have different padding. By default there is no padding.
      logit_soft_cap: positive bound of the student's logits. May be traced.
      teacher_logit_soft_cap: positive bound of the teacher's logits. May be traced.
      temperature: T, which divides the logits of both. A scalar or an array with the axes of the
        loss (size 1 broadcasts). At least 1e-6. May be traced.
      reverse: exchange p and p', as in `distillation_loss`.
      sample_weight: weight of each row, a scalar or an array with the axes of the loss (size 1
        broadcasts).
      where: bool, a scalar or an array with the axes of the loss (size 1 broadcasts): rows to
        include, such as `next_tokens(...).where`. If the teacher is a layer, other rows take almost
        no time.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which the classes of all arrays are
        sharded in the same way.
      reduction: "none"; "sum"; "ratio", which gives a `Ratio`; or "mean", the sum divided by
        `sum(sample_weight)` of the rows that count (0 if that is 0).
      reduction_axis: the axis or axes of the loss to reduce; all by default.
      memory_budget: bytes that the blocks of logits and their gradients may take. The default is
        that of `linear_softmax_cross_entropy`, for both kernels together.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, of shape `[...]` or `[]`, in float32 (float64 if an input is).

    Raises:
      TypeError: for a dtype or type that does not fit, such as hidden states wider than the kernel.
      ValueError: for a shape, an axis or a value that does not fit, or unless the teacher is given
        in exactly one way.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 2))
      >>> teacher_logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
      >>> loss = ce_jax.linear_distillation_loss(hidden, kernel, teacher_logits=teacher_logits)
      >>> print(loss)
      [0.     0.1308]

    References:
      See `distillation_loss`.
    """
    student, teacher = given_layers(
        (hidden, kernel, bias, logit_soft_cap),
        (teacher_hidden, teacher_kernel, teacher_bias, teacher_logit_soft_cap),
        teacher_logits,
    )
    return of_layers(
        student,
        teacher,
        teacher_logits,
        options.temperature(temperature),
        None,
        sample_weight,
        where,
        class_axis=checks.int_option("class_axis", class_axis),
        teacher_class_axis=checks.int_option("teacher_class_axis", teacher_class_axis),
        num_classes=checks.integer_option("num_classes", num_classes),
        reverse=reverse,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def of_layers(
    student: GivenLayer,
    teacher: GivenLayer | None,
    teacher_logits: Array | None,
    temperature: Array | None,
    beta: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    *,
    class_axis: int,
    teacher_class_axis: int,
    num_classes: int | None,
    reverse: bool,
    axis_name: str | None,
    reduction: Reducer,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss:
    """The same of a student's layer and a teacher's layer or logits."""
    x = two_heads(
        student,
        teacher,
        teacher_logits,
        where,
        sample_weight,
        class_axis=class_axis,
        teacher_class_axis=teacher_class_axis,
        num_classes=num_classes,
        axis_name=axis_name,
        memory_budget=memory_budget,
    )
    temperature = options.row_temperature(temperature, x.rows, x.dtype, x.counts)
    temperature, weights = jax.tree.map(jnp.ravel, (temperature, x.weights))
    temperature = in_order(x.order, temperature, fill=1)
    weights = in_order(x.order, weights)
    loss = _loss(
        x.options,
        x.student,
        x.teacher,
        temperature=temperature,
        beta=None if beta is None else beta.astype(x.dtype),
        sample_weight=weights,
        reverse=reverse,
        forward_mode=forward_mode,
        used=x.used,
        counting=x.counting,
    )
    loss = as_given(x.order, loss)
    return reductions.reduce(loss.reshape(x.rows), x.counts, x.weights, reduction)
