r"""Jensen-Shannon divergence of teacher and student: each is compared with a mixture of both."""

from __future__ import annotations

from collections.abc import Sequence

from ._arguments import checks, options, reductions
from ._arguments.two_heads import given_layers
from ._arguments.types import ArrayLike, Axes, Loss, Reduction, Scalar, reducible
from .distillation import of_layers, of_logits


@reducible
def jensen_shannon_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: Scalar = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Generalized Jensen-Shannon divergence of the student's softmax and the teacher's, in nats.

    With logits z of the student, z' of the teacher, and a temperature T:

    .. math::
      \ell = T^2 \left(\beta \sum_c p'_c \log \frac{p'_c}{m_c}
        + (1 - \beta) \sum_c p_c \log \frac{p_c}{m_c}\right), \qquad m = \beta p' + (1 - \beta) p

    for :math:`p = \mathrm{softmax}(z / T)` and :math:`p' = \mathrm{softmax}(z' / T)`. For
    :math:`\beta = 1/2` the divergence is symmetric and at most :math:`T^2 \log 2`. It is finite
    also where one side masks a class. For beta near 0 it is about :math:`\beta` times
    `distillation_loss`; for beta near 1 it is about :math:`1 - \beta` times `distillation_loss`
    with `reverse=True`. Divide by these factors to keep the size of the gradients. Where the
    student is close to the teacher, the loss is of second order in the difference of their logits,
    and has as many right digits as that difference. Both logits, temperature and beta get their
    true gradient: apply `jax.lax.stop_gradient` to the teacher if it must not learn.

    Args:
      logits: the student's logits `[..., C]`, floating; `-inf` marks a class that is not allowed.
      teacher_logits: the teacher's logits, of the same shape and of any floating dtype.
      beta: the teacher's share of the mixture, between 0 and 1. May be traced.
      temperature: T, which divides the logits of both. A scalar or an array with the axes of the
        loss (size 1 broadcasts). At least 1e-6. May be traced.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: bool; rows to include (shape of the loss) or classes to include (shape of `logits`).
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
      The loss, of shape `[...]` or `[]`, in float32 (float64 if either array is float64).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape, an axis or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.75, 0.25]))
      >>> print(ce_jax.jensen_shannon_loss(student, teacher))
      0.0338
      >>> banned = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
      >>> print(ce_jax.jensen_shannon_loss(banned, banned[::-1]))
      [0.6931 0.6931]

    References:
      Lin, `Divergence Measures Based on the Shannon Entropy`, 1991; Agarwal et al., `On-Policy
      Distillation of Language Models: Learning from Self-Generated Mistakes`, 2024.
    """
    return of_logits(
        logits,
        teacher_logits,
        where,
        options.temperature(temperature),
        beta_option(beta),
        sample_weight,
        axis=checks.static_axis(axis),
        reverse=False,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        forward_mode=forward_mode,
    )


def beta_option(value: Scalar) -> ArrayLike:
    """The teacher's share of the mixture, checked if it is known."""
    share = options.scalar("beta", value, 0.0, 1.0)
    if options.known_value("beta", value) in (0.0, 1.0):
        raise ValueError(
            f"beta must be above 0 and below 1, got {value}; the loss is 0 at 0 and at 1: write "
            "distillation_loss there, with reverse=True in place of 1"
        )
    return share


@reducible
def linear_jensen_shannon_loss(
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
    beta: Scalar = 0.5,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    reduction_axis: Axes = None,
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Jensen-Shannon divergence of a linear layer's softmax, without its logits in memory.

    .. math::
      \ell = T^2 \left(\beta\, \mathrm{KL}(p' \,\|\, m) + (1 - \beta)\, \mathrm{KL}(p \,\|\, m)
        \right), \qquad m = \beta p' + (1 - \beta) p

    This is `jensen_shannon_loss` of the logits of `linear_softmax_cross_entropy`. The teacher's
    logits come from its own linear layer or are given. The mixture needs both normalisers, so each
    block of classes is computed twice for the loss and once more for the gradient. Value and
    gradient take five matmuls of the student (`linear_distillation_loss`: four) and three of the
    teacher (`linear_distillation_loss`: two).

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
      beta: the teacher's share of the mixture, between 0 and 1. May be traced.
      temperature: T, which divides the logits of both. A scalar or an array with the axes of the
        loss (size 1 broadcasts). At least 1e-6. May be traced.
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
        custom gradient; JAX then differentiates by its own rules. The gradient of a kernel in a
        narrow dtype is then the sum of two rounded gradients.

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
      >>> loss = ce_jax.linear_jensen_shannon_loss(hidden, kernel, teacher_logits=teacher_logits)
      >>> print(loss)
      [0.     0.0338]

    References:
      See `jensen_shannon_loss`.
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
        beta_option(beta),
        sample_weight,
        where,
        class_axis=checks.int_option("class_axis", class_axis),
        teacher_class_axis=checks.int_option("teacher_class_axis", teacher_class_axis),
        num_classes=checks.integer_option("num_classes", num_classes),
        reverse=False,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction, reduction_axis),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )
