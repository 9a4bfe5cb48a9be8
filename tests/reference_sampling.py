"""The truth of losses over sampled classes, in float64 NumPy, one row and one negative at a time.

As in `reference`, everything runs on complex numbers too, so that `reference.vjp` differentiates.
"""

import numpy as np

from tests import reference


def sampled_softmax_cross_entropy(
    label_logits,
    negative_logits,
    where=None,
    *,
    log_expected_count=0.0,
    label_log_expected_count=0.0,
    sample_weight=None,
    reduction="none",
):
    label, negatives, counts, included = _arguments(label_logits, negative_logits, where)
    label = label - label_log_expected_count
    negatives = negatives - log_expected_count

    def row_loss(row):
        z = np.append(label[row], negatives[row][included[row]])
        highest = z.real.max()
        return np.log(np.sum(np.exp(z - highest))) - (z[0] - highest)

    return _reduced(row_loss, counts, sample_weight, reduction)


def linear_sampled_softmax_cross_entropy(
    hidden,
    kernel,
    labels,
    ids,
    log_expected_count,
    *,
    bias=None,
    class_axis=-1,
    logit_soft_cap=None,
    label_log_expected_count=0.0,
    where=None,
    ignore_index=None,
    sample_weight=None,
    reduction="none",
):
    """The negatives' ids and expected counts come as two arguments."""
    counts = (labels != ignore_index) & (True if where is None else where)
    usable = np.where(counts, labels, 0)
    z = np.where(counts[..., None], hidden, 0) @ (kernel if class_axis == -1 else kernel.T)
    z = z if bias is None else z + bias
    z = z if logit_soft_cap is None else logit_soft_cap * np.tanh(z / logit_soft_cap)
    ids, log_expected_count = (
        np.broadcast_to(x, (*labels.shape, x.shape[-1])) for x in (ids, log_expected_count)
    )
    included = (ids != labels[..., None]) & np.isfinite(log_expected_count)
    loss = sampled_softmax_cross_entropy(
        np.take_along_axis(z, usable[..., None], -1)[..., 0],
        np.take_along_axis(z, np.where(included, ids, 0), -1),
        included,
        log_expected_count=np.where(included, log_expected_count, 0),
        label_log_expected_count=label_log_expected_count,
    )
    return _reduced(lambda row: loss[row], counts, sample_weight, reduction)


def bpr_loss(label_logits, negative_logits, where=None, *, sample_weight=None, reduction="none"):
    label, negatives, counts, included = _arguments(label_logits, negative_logits, where)
    counts = counts & included.any(-1)

    def row_loss(row):
        behind = negatives[row][included[row]] - label[row]
        return sum(map(reference._softplus, behind)) / len(behind)

    return _reduced(row_loss, counts, sample_weight, reduction)


def gbce_loss(
    label_logits,
    negative_logits,
    where=None,
    *,
    num_items,
    calibration=0.75,
    sample_weight=None,
    reduction="none",
):
    label, negatives, counts, included = _arguments(label_logits, negative_logits, where)

    def row_loss(row):
        drawn = negatives[row][included[row]]
        alpha = len(drawn) / (num_items - 1)
        # As the paper writes it, multiplied out where alpha is 0.
        beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha) if alpha else 1 - calibration
        total = beta * reference._softplus(-label[row]) + sum(map(reference._softplus, drawn))
        return total / (len(drawn) + 1)

    return _reduced(row_loss, counts, sample_weight, reduction)


def log_uniform(items):
    k = np.arange(items)
    return np.log((k + 2) / (k + 1)) / np.log(items + 1)


def _arguments(label, negatives, where):
    label, negatives = np.asarray(label), np.asarray(negatives)
    counts, included = np.ones(label.shape, bool), np.ones(negatives.shape, bool)
    if where is not None and np.ndim(where) == negatives.ndim:
        included = np.broadcast_to(where, negatives.shape)
    elif where is not None:
        counts = np.broadcast_to(where, label.shape)
    return label, negatives, counts, included


def _reduced(row_loss, counts, sample_weight, reduction):
    scaled = [
        reference._scaled(sample_weight, row, counts.shape, row_loss(row)) if counts[row] else 0.0
        for row in np.ndindex(counts.shape)
    ]
    losses = np.array(scaled).reshape(counts.shape)
    denominator = reference.mean_denominator(losses, sample_weight=sample_weight, where=counts)
    return reference._reduced(losses, reduction, denominator)
