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
            t = reference._at(temperature, row, counts.shape)
            log_p, log_q = _log_softmax(p, in_p, t), _log_softmax(q, in_q, t)
            terms = np.exp(log_p[in_p]) * (log_p[in_p] - log_q[in_p])
            loss = t**2 * np.sum(terms) if in_q[in_p].all() else np.inf
        losses.append(reference._scaled(sample_weight, row, counts.shape, loss))
    return _reduced(losses, counts, sample_weight, reduction)


def jensen_shannon_loss(
    logits,
    teacher_logits,
    *,
    beta=0.5,
    temperature=1.0,
    axis=-1,
    where=None,
    sample_weight=None,
    reduction="none",
):
    """With log(p / m) = -log(m / p), which needs no logarithm of what is nearly 0."""
    student, counts, allowed = reference._layout(logits, axis, where)
    teacher, _, teacher_allowed = reference._layout(teacher_logits, axis, where)
    losses = []
    for row in np.ndindex(counts.shape):
        loss = 0.0
        if counts[row]:
            t = reference._at(temperature, row, counts.shape)
            of_teacher = np.exp(_log_softmax(teacher[row], teacher_allowed[row], t))
            of_student = np.exp(_log_softmax(student[row], allowed[row], t))
            m = beta * of_teacher + (1 - beta) * of_student
            for share, p in ((beta, of_teacher), (1 - beta, of_student)):
                some = p.real > 0
                loss = loss - t**2 * share * np.sum(p[some] * np.log(m[some] / p[some]))
        losses.append(reference._scaled(sample_weight, row, counts.shape, loss))
    return _reduced(losses, counts, sample_weight, reduction)


def top_k_distillation_loss(
    logits,
    teacher_ids,
    teacher_log_probs,
    *,
    tail="bucket",
    axis=-1,
    where=None,
    temperature=1.0,
    sample_weight=None,
    ignore_index=None,
    reduction="none",
):
    student, counts, allowed = reference._layout(logits, axis, where)
    known = (teacher_ids != -1) & (teacher_ids != ignore_index)
    counts = counts & known.any(-1)
    losses = []
    for row in np.ndindex(counts.shape):
        loss = 0.0
        if counts[row]:
            t = reference._at(temperature, row, counts.shape)
            p = np.exp(teacher_log_probs[row][known[row]])
            ids = teacher_ids[row][known[row]]
            log_q = _log_softmax(student[row], allowed[row], t)
            log_q_k = log_q[ids]
            if tail == "renormalize":
                p = p / np.sum(p)
            if tail == "bucket":
                others = np.ones(allowed[row].shape, bool)
                others[ids] = False
                rest = 1 - np.sum(p)
                p = np.append(p, rest)
                with np.errstate(divide="ignore"):
                    log_q_k = np.append(log_q_k, np.log(np.sum(np.exp(log_q[others]))))
            some = p.real > 0
            banned = np.any(log_q_k[some].real == -np.inf)
            loss = np.inf if banned else t**2 * np.sum(p[some] * (np.log(p[some]) - log_q_k[some]))
        losses.append(reference._scaled(sample_weight, row, counts.shape, loss))
    return _reduced(losses, counts, sample_weight, reduction)


def _reduced(losses, counts, sample_weight, reduction):
    losses = np.array(losses).reshape(counts.shape)
    denominator = reference.mean_denominator(losses, sample_weight=sample_weight, where=counts)
    return reference._reduced(losses, reduction, denominator)


def linear_top_k_distillation_loss(
    hidden,
    kernel,
    teacher_ids,
    teacher_log_probs,
    *,
    bias=None,
    class_axis=-1,
    num_classes=None,
    logit_soft_cap=None,
    where=None,
    ignore_index=None,
    **options,
):
    counts = np.ones(hidden.shape[:-1], bool) if where is None else where
    counts = counts & np.any((teacher_ids != -1) & (teacher_ids != ignore_index), -1)
    z = reference_linear.logits(
        np.where(counts[..., None], hidden, 0),
        kernel,
        bias,
        class_axis,
        num_classes,
        logit_soft_cap,
    )
    options |= {"where": counts, "ignore_index": ignore_index}
    return top_k_distillation_loss(z, teacher_ids, teacher_log_probs, **options)


def linear_jensen_shannon_loss(hidden, kernel, **options):
    return linear_distillation_loss(hidden, kernel, dense=jensen_shannon_loss, **options)


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
    dense=distillation_loss,
    **options,
):
    counts = np.ones(hidden.shape[:-1], bool) if where is None else where

    def of_layer(hidden, *rest):
        return reference_linear.logits(np.where(counts[..., None], hidden, 0), *rest)

    z = of_layer(hidden, kernel, bias, class_axis, num_classes, logit_soft_cap)
    if teacher_logits is None:
        rest = teacher_bias, teacher_class_axis, num_classes, teacher_logit_soft_cap
        teacher_logits = of_layer(teacher_hidden, teacher_kernel, *rest)
    return dense(z, teacher_logits[..., :num_classes], where=counts, **options)


def _log_softmax(z, allowed, temperature):
    z = np.where(allowed, z, 0) / temperature
    highest = z[allowed].real.max()
    log_sum = highest + np.log(np.sum(np.exp(z[allowed] - highest)))
    return np.where(allowed, z - log_sum, -np.inf)
