"""The truth of distillation in float64 NumPy: both softmaxes held, one row at a time.

As in `reference`, everything runs on complex numbers too, so that `reference.vjp` differentiates.
"""

import numpy as np

from tests import reference, reference_linear


def distillation_loss(
    logits,
    teacher_logits,
    axis=-1,
    where=None,
    *,
    temperature=1.0,
    reverse=False,
    sample_weight=None,
    reduction="none",
):
    student, counts, allowed = reference._layout(logits, axis, where)
    teacher, _, teacher_allowed = reference._layout(teacher_logits, axis, where)
    losses = []
    for row in np.ndindex(counts.shape):
        loss = 0.0
        if counts[row]:
            sides = [(teacher[row], teacher_allowed[row]), (student[row], allowed[row])]
            (p, in_p), (q, in_q) = sides[::-1] if reverse else sides
            log_p, log_q = _log_softmax(p, in_p, temperature), _log_softmax(q, in_q, temperature)
            terms = np.exp(log_p[in_p]) * (log_p[in_p] - log_q[in_p])
            loss = temperature**2 * np.sum(terms) if in_q[in_p].all() else np.inf
        losses.append(reference._scaled(sample_weight, row, counts.shape, loss))
    losses = np.array(losses).reshape(counts.shape)
    denominator = reference.mean_denominator(losses, sample_weight=sample_weight, where=counts)
    return reference._reduced(losses, reduction, denominator)


def linear_distillation_loss(
    hidden,
    kernel,
    *,
    teacher_logits=None,
    teacher_hidden=None,
    teacher_kernel=None,
    bias=None,
    teacher_bias=None,
    class_axis=-1,
    teacher_class_axis=-1,
    num_classes=None,
    logit_soft_cap=None,
    teacher_logit_soft_cap=None,
    where=None,
    **options,
):
    counts = np.ones(hidden.shape[:-1], bool) if where is None else where

    def of_layer(hidden, *rest):
        return reference_linear.logits(np.where(counts[..., None], hidden, 0), *rest)

    z = of_layer(hidden, kernel, bias, class_axis, num_classes, logit_soft_cap)
    if teacher_logits is None:
        rest = teacher_bias, teacher_class_axis, num_classes, teacher_logit_soft_cap
        teacher_logits = of_layer(teacher_hidden, teacher_kernel, *rest)
    return distillation_loss(z, teacher_logits[..., :num_classes], where=counts, **options)


def _log_softmax(z, allowed, temperature):
    z = np.where(allowed, z, 0) / temperature
    highest = z[allowed].real.max()
    log_sum = highest + np.log(np.sum(np.exp(z[allowed] - highest)))
    return np.where(allowed, z - log_sum, -np.inf)
