"""The truth of the linear form: the logits as a NumPy matmul, then the truth of the losses.

`linear_softmax_cross_entropy` and `linear_softmax_statistics` run on complex numbers, so that
`reference.vjp` differentiates them. `closed_form` has the gradients as formulas, for so many
classes that one evaluation per parameter would take too long; the first checks the second.
"""

import numpy as np

from tests import reference


def logits(hidden, kernel, bias=None, class_axis=-1, num_classes=None, logit_soft_cap=None):
    kernel = kernel if class_axis in (1, -1) else np.swapaxes(kernel, 0, 1)
    u = hidden @ kernel[:, :num_classes]
    if bias is not None:
        u = u + bias[:num_classes]
    if logit_soft_cap is None:
        return u
    # A bias of -inf bans its class: the cap must not let it in again.
    banned = u.real == -np.inf
    return np.where(banned, u, logit_soft_cap * np.tanh(np.where(banned, 0, u) / logit_soft_cap))


def focal(log_prob, gamma):
    return -log_prob * (-np.expm1(log_prob)) ** gamma


def linear_softmax_cross_entropy(
    hidden,
    kernel,
    labels,
    *,
    bias=None,
    class_axis=-1,
    num_classes=None,
    logit_soft_cap=None,
    weight=None,
    sample_weight=None,
    where=None,
    ignore_index=None,
    label_smoothing=0.0,
    z_loss=0.0,
    temperature=1.0,
    gamma=None,
    reduction="none",
):
    """`gamma` is that of `focal`, the `log_prob_loss` of the tests."""
    counts = np.ones(labels.shape, bool) if where is None else np.broadcast_to(where, labels.shape)
    counts = counts & (labels != ignore_index)
    # Whatever rows that do not count hold, they take no part; nor does padding.
    z = logits(
        np.where(counts[..., None], hidden, 0),
        kernel,
        bias,
        class_axis,
        num_classes,
        logit_soft_cap,
    )
    weight = None if weight is None else weight[:num_classes]
    z = reference._tempered(z, temperature)
    options = {"where": counts, "weight": weight, "label_smoothing": label_smoothing}
    losses = reference.softmax_cross_entropy_with_integer_labels(
        z, labels, **options, z_loss=z_loss
    )
    if gamma is not None:
        usable = np.where(counts, labels, 0)
        log_prob = reference.softmax_statistics(z, usable).log_prob
        of_label = 1.0 if weight is None else weight[usable]
        instead = (1 - label_smoothing) * of_label * (focal(log_prob, gamma) + log_prob)
        losses = np.where(counts, losses + instead, 0)
    rows = np.ndindex(labels.shape)
    scaled = [reference._scaled(sample_weight, row, labels.shape, losses[row]) for row in rows]
    denominator = reference.mean_denominator(
        labels, weight=weight, sample_weight=sample_weight, where=counts
    )
    return reference._reduced(np.reshape(scaled, labels.shape), reduction, denominator)


def linear_softmax_statistics(
    hidden,
    kernel,
    labels,
    *,
    bias=None,
    class_axis=-1,
    num_classes=None,
    logit_soft_cap=None,
    where=None,
    ignore_index=None,
    temperature=1.0,
):
    counts = np.ones(labels.shape, bool) if where is None else np.broadcast_to(where, labels.shape)
    counts = counts & (labels != ignore_index)
    z = logits(
        np.where(counts[..., None], hidden, 0),
        kernel,
        bias,
        class_axis,
        num_classes,
        logit_soft_cap,
    )
    found = reference.softmax_statistics(z, np.where(counts, labels, 0), temperature=temperature)
    return reference.Statistics(*(np.where(counts, x, 0) for x in found))


def closed_form(
    hidden,
    kernel,
    labels,
    cotangent,
    *,
    bias,
    weight,
    logit_soft_cap=np.inf,
    label_smoothing=0.0,
    z_loss=0.0,
):
    """Losses of rows `[N]` and, under a cotangent `[N]`, gradients of all arrays, by name."""
    hidden, kernel, bias, weight = (
        np.asarray(x, np.float64) for x in (hidden, kernel, bias, weight)
    )
    u = hidden @ kernel + bias
    z, slope = u, 1.0
    if np.isfinite(logit_soft_cap):
        z = logit_soft_cap * np.tanh(u / logit_soft_cap)
        slope = 1 - (z / logit_soft_cap) ** 2
    highest = z.max(-1, keepdims=True)
    lse = highest + np.log(np.exp(z - highest).sum(-1, keepdims=True))
    one_hot = labels[:, None] == np.arange(z.shape[1])
    share = (1 - label_smoothing) * one_hot + label_smoothing / z.shape[1]
    surprise = lse - z
    target = share * weight
    losses = (target * surprise).sum(-1) + z_loss * lse[:, 0] ** 2
    total = target.sum(-1, keepdims=True) + 2 * z_loss * lse
    du = cotangent[:, None] * (total * np.exp(-surprise) - target) * slope
    return losses, {
        "hidden": du @ kernel.T,
        "kernel": hidden.T @ du,
        "bias": du.sum(0),
        "weight": (cotangent[:, None] * share * surprise).sum(0),
    }
