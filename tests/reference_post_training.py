"""The truth of losses of preferences and policies, in float64 NumPy, element by element.

As in `reference`: the names and arguments are those of the functions, the formulas those of the
papers, and everything runs on complex numbers, so that `reference.vjp` differentiates.
"""

import numpy as np

from tests import reference


def dpo_loss(
    chosen,
    rejected,
    reference_chosen,
    reference_rejected,
    *,
    where=None,
    beta=0.1,
    label_smoothing=0.0,
    sample_weight=None,
    reduction="none",
):
    def loss(w, l, ref_w, ref_l):  # noqa: E741
        h = (w - ref_w) - (l - ref_l)
        right, wrong = _log_sigmoid(beta * h), _log_sigmoid(-beta * h)
        return -(1 - label_smoothing) * right - label_smoothing * wrong

    arrays = chosen, rejected, reference_chosen, reference_rejected
    return _each(loss, arrays, where, sample_weight, reduction)


def ipo_loss(
    chosen,
    rejected,
    reference_chosen,
    reference_rejected,
    *,
    where=None,
    beta=0.1,
    sample_weight=None,
    reduction="none",
):
    def loss(w, l, ref_w, ref_l):  # noqa: E741
        return ((w - ref_w) - (l - ref_l) - 1 / (2 * beta)) ** 2

    arrays = chosen, rejected, reference_chosen, reference_rejected
    return _each(loss, arrays, where, sample_weight, reduction)


def simpo_loss(
    chosen, rejected, *, where=None, beta=2.0, gamma=1.0, sample_weight=None, reduction="none"
):
    def loss(w, l):  # noqa: E741
        return -_log_sigmoid(beta * w - beta * l - gamma)

    return _each(loss, (chosen, rejected), where, sample_weight, reduction)


def orpo_loss(chosen, rejected, *, where=None, sample_weight=None, reduction="none"):
    def log_odds(x):
        return x - np.log(1 - np.exp(x))

    def loss(w, l):  # noqa: E741
        return -_log_sigmoid(log_odds(w) - log_odds(l))

    return _each(loss, (chosen, rejected), where, sample_weight, reduction)


def kto_loss(
    log_prob,
    reference_log_prob,
    desirable,
    kl,
    *,
    where=None,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    sample_weight=None,
    reduction="none",
):
    def loss(x, ref, good, z):
        ahead = beta * (x - ref - np.maximum(np.real(z), 0))
        if good:
            return desirable_weight * (1 - np.exp(_log_sigmoid(ahead)))
        return undesirable_weight * (1 - np.exp(_log_sigmoid(-ahead)))

    arrays = log_prob, reference_log_prob, desirable, kl
    return _each(loss, arrays, where, sample_weight, reduction)


def ppo_clip_loss(
    log_prob,
    old_log_prob,
    advantage,
    *,
    where=None,
    low=0.2,
    high=0.2,
    sample_weight=None,
    reduction="none",
):
    def loss(x, old, a):
        ratio = np.exp(x - old)
        clipped = ratio
        if np.real(ratio) < np.real(1 - low):
            clipped = 1 - low
        if np.real(ratio) > np.real(1 + high):
            clipped = 1 + high
        return -min(ratio * a, clipped * a, key=np.real)

    arrays = log_prob, old_log_prob, advantage
    return _each(loss, arrays, where, sample_weight, reduction)


def kl_estimate(
    log_prob,
    reference_log_prob,
    *,
    where=None,
    kind="k3",
    sample_weight=None,
    reduction="none",
):
    def estimate(x, ref):
        log_r = ref - x
        if kind == "k3":
            return np.expm1(log_r) - log_r
        return -log_r if kind == "k1" else log_r**2 / 2

    return _each(estimate, (log_prob, reference_log_prob), where, sample_weight, reduction)


def sequence_log_prob(log_prob, where=None, *, mean=False):
    log_prob = np.asarray(log_prob)
    where = np.broadcast_to(True if where is None else where, log_prob.shape)
    found = np.zeros(log_prob.shape[:-1], log_prob.dtype)
    for row in np.ndindex(found.shape):
        chosen = log_prob[row][where[row]]
        found[row] = chosen.sum() / (max(len(chosen), 1) if mean else 1)
    return found


def smoothed_label_entropy(label_smoothing, num_classes):
    """Of the target itself, written out."""
    target = np.full(num_classes, label_smoothing / num_classes)
    target[0] += 1 - label_smoothing
    return -sum(p * np.log(p) for p in target if p > 0)


def _log_sigmoid(x):
    return -reference._softplus(-x)


def _each(loss, arrays, where, sample_weight, reduction):
    shape = np.shape(arrays[0])
    arrays = [np.broadcast_to(x, shape) for x in arrays]
    where = np.broadcast_to(True if where is None else where, shape)
    losses, total = [], 0.0
    for index in np.ndindex(shape):
        if not where[index]:
            losses.append(0.0)
            continue
        value = loss(*(x[index] for x in arrays))
        losses.append(reference._scaled(sample_weight, index, shape, value))
        total = total + reference._at(sample_weight, index, shape)
    return reference._reduced(np.array(losses).reshape(shape), reduction, total)
