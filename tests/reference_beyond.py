"""The truth of what goes beyond plain cross-entropy, in float64 NumPy, as `reference` has it.

Every function has the name and the arguments of the one it is the truth for, is written from the
papers' formulas, and runs on complex numbers where it is differentiated.
"""

import itertools

import numpy as np

from tests import reference


def focal_loss(log_prob, *, gamma=2.0):
    x = np.asarray(log_prob)
    return -x * (-np.expm1(x)) ** gamma


def poly_loss(log_prob, *, epsilon=2.0):
    x = np.asarray(log_prob)
    return -x - epsilon * np.expm1(x)


def generalized_cross_entropy(log_prob, *, q=0.7):
    x = np.asarray(log_prob)
    return -np.expm1(q * x) / q


def symmetric_cross_entropy(log_prob, *, alpha=0.1, beta=1.0, log_zero=-4.0):
    x = np.asarray(log_prob)
    return -alpha * x + beta * log_zero * np.expm1(x)


def soft_bootstrapped_cross_entropy(log_prob, entropy, *, beta=0.95):
    return -beta * np.asarray(log_prob) + (1 - beta) * np.asarray(entropy)


def hard_bootstrapped_cross_entropy(log_prob, argmax_log_prob, *, beta=0.8):
    return -beta * np.asarray(log_prob) - (1 - beta) * np.asarray(argmax_log_prob)


def sigmoid_focal_loss(
    logits, labels, *, alpha=None, gamma=2.0, sample_weight=None, where=None, reduction="none"
):
    logits = np.asarray(logits)
    alpha = None if alpha is None else np.broadcast_to(alpha, logits.shape)
    gamma, labels = (np.broadcast_to(x, logits.shape) for x in (gamma, labels))
    inputs = (logits, labels, gamma, alpha, sample_weight)
    losses = reference._zeros(logits.shape, *(x for x in inputs if x is not None))
    total = 0.0
    for index in np.ndindex(logits.shape):
        if where is not None and not np.broadcast_to(where, logits.shape)[index]:
            continue
        z, y = logits[index], labels[index]
        log_p, log_not_p = -reference._softplus(-z), -reference._softplus(z)
        miss = y * np.exp(log_not_p) + (1 - y) * np.exp(log_p)
        loss = miss ** gamma[index] * (-y * log_p - (1 - y) * log_not_p)
        if alpha is not None:
            loss = loss * (alpha[index] * y + (1 - alpha[index]) * (1 - y))
        losses[index] = reference._scaled(sample_weight, index, logits.shape, loss)
        total = total + reference._at(sample_weight, index, logits.shape)
    return reference._reduced(losses, reduction, total)


def poly_loss_cross_entropy(
    logits, labels, *, epsilon=2.0, axis=-1, where=None, sample_weight=None, reduction="none"
):
    def loss(log_p, target):
        probability = sum(t * np.exp(x) for t, x in zip(target, log_p, strict=True))
        return _cross(target, log_p) + epsilon * (sum(target) - probability)

    targets = reference._class_last(np.asarray(labels), axis)
    inputs = (logits, labels, sample_weight, epsilon)
    return _by_row(loss, inputs, logits, targets, axis, where, sample_weight, reduction)


def forward_corrected_cross_entropy(
    logits,
    labels,
    transition,
    *,
    axis=-1,
    where=None,
    sample_weight=None,
    ignore_index=None,
    reduction="none",
):
    def loss(log_p, label):
        return -np.log(np.sum(np.asarray(transition)[:, label] * np.exp(log_p)))

    inputs = (logits, transition, sample_weight)
    return _by_row(
        loss, inputs, logits, labels, axis, where, sample_weight, reduction, ignore_index
    )


def backward_corrected_cross_entropy(
    logits,
    labels,
    transition,
    *,
    axis=-1,
    where=None,
    sample_weight=None,
    ignore_index=None,
    reduction="none",
):
    def loss(log_p, label):
        return _cross(np.linalg.inv(np.asarray(transition))[label], log_p)

    inputs = (logits, transition, sample_weight)
    return _by_row(
        loss, inputs, logits, labels, axis, where, sample_weight, reduction, ignore_index
    )


def _cross(target, log_p):
    """`-<t, log p>` with 0 log 0 = 0, also where `t` moves in the imaginary direction."""
    terms = zip(target, log_p, strict=True)
    return -sum(t * x for t, x in terms if np.real(t) != 0 or np.isfinite(x))


def _by_row(loss, inputs, logits, labels, axis, where, sample_weight, reduction, ignore_index=None):
    """`loss(log-probabilities, label)` of every row that counts, then weights and reduction."""
    batch, rows, allowed = reference._layout(logits, axis, where)
    labels = np.asarray(labels)
    if labels.ndim == rows.ndim:
        rows = rows & (labels != ignore_index)
    losses = reference._zeros(rows.shape, *(x for x in inputs if x is not None))
    total = 0.0
    for row in np.ndindex(rows.shape):
        if not rows[row]:
            continue
        z = np.where(allowed[row], batch[row], -np.inf)
        z = z - z[allowed[row]].real.max()
        log_p = np.where(allowed[row], z - np.log(np.sum(np.exp(z[allowed[row]]))), -np.inf)
        value = loss(log_p, labels[row])
        losses[row] = reference._scaled(sample_weight, row, rows.shape, value)
        total = total + reference._at(sample_weight, row, rows.shape)
    return reference._reduced(losses, reduction, total)


def inverse_frequency_weights(counts):
    present = np.asarray(counts) > 0
    inverse = np.array([1 / n if n else 0.0 for n in counts])
    return inverse * present.sum() / inverse.sum()


def balanced_weights(counts):
    present = np.asarray(counts) > 0
    return np.array([np.sum(counts) / (present.sum() * n) if n else 0.0 for n in counts])


def effective_number_weights(counts, *, beta=0.999):
    """As a sum of powers, the definition before it is summed up."""
    effective = [np.sum(beta ** np.arange(n, dtype=float)) for n in counts]
    inverse = np.array([1 / e if e else 0.0 for e in effective])
    return inverse * np.sum(np.asarray(counts) > 0) / inverse.sum()


def estimate_prior(logits, train_prior, steps, sample_weight=None):
    posterior = np.exp(np.asarray(logits, float))
    posterior /= posterior.sum(-1, keepdims=True)
    weight = np.ones(len(posterior)) if sample_weight is None else np.asarray(sample_weight, float)
    prior = np.asarray(train_prior, float)
    for _ in range(steps):
        joint = posterior * prior / train_prior
        prior = weight @ (joint / joint.sum(-1, keepdims=True)) / weight.sum()
    return prior


def cross_entropy_parts(logits, labels, axis=-1, where=None):
    """Entropy and divergence of each row and class."""
    batch, rows, allowed = reference._layout(logits, axis, where)
    targets = reference._class_last(np.asarray(labels, float), axis)
    entropy, divergence = np.zeros(batch.shape), np.zeros(batch.shape)
    for row in np.ndindex(rows.shape):
        if not rows[row]:
            continue
        p = np.where(allowed[row], np.exp(batch[row] - batch[row][allowed[row]].max()), 0)
        p = p / p.sum()
        for c, q in enumerate(targets[row]):
            if q > 0:
                entropy[row][c] = -q * np.log(q)
                divergence[row][c] = q * np.log(q / p[c]) - q + p[c]
            else:
                divergence[row][c] = p[c]
    return entropy, divergence


def reliability_bins(confidence, correct, *, bins, adaptive):
    """A list of bins, each the indices in it, then their statistics.

    The borders of adaptive bins cut ties: there each prediction is worth the mean of its equals.
    """
    if adaptive:
        order = np.argsort(confidence, kind="stable")
        bounds = [-(-b * order.size // bins) for b in range(bins + 1)]
        groups = [order[a:b] for a, b in itertools.pairwise(bounds)]
        correct = np.array([np.mean(correct[confidence == c]) for c in confidence])
    else:
        edges = (np.arange(bins + 1) / bins).astype(confidence.dtype)
        edges[0] = -1
        groups = [
            np.flatnonzero((confidence > a) & (confidence <= b))
            for a, b in itertools.pairwise(edges)
        ]
    size = np.array([len(g) for g in groups])
    means = [
        [np.mean(x[g], dtype=float) if len(g) else np.nan for g in groups]
        for x in (confidence, correct)
    ]
    return size, *means


def expected_calibration_error(confidence, correct, *, bins=15, adaptive=False):
    size, mean, accuracy = reliability_bins(confidence, correct, bins=bins, adaptive=adaptive)
    return np.nansum(size / size.sum() * np.abs(np.subtract(mean, accuracy)))


def brier_score(
    logits,
    labels,
    axis=-1,
    where=None,
    *,
    sample_weight=None,
    ignore_index=None,
    reduction="none",
):
    def loss(log_p, label):
        return np.sum((np.exp(log_p) - (np.arange(log_p.size) == label)) ** 2)

    inputs = (logits, sample_weight)
    return _by_row(
        loss, inputs, logits, labels, axis, where, sample_weight, reduction, ignore_index
    )
