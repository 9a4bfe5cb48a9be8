"""The truth the losses are tested against: float64 NumPy, one row or one element at a time.

Every function has the name, the arguments and the defaults of the function it is the truth for.
Nothing here is fast and nothing is shared with the library. All arithmetic also runs on complex
numbers, so that `vjp` can differentiate with the complex step: f(x + ih) = f(x) + ih f'(x), with no
difference of nearby numbers and so no error beyond rounding.
"""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    lse: np.ndarray
    label_logit: np.ndarray
    log_prob: np.ndarray
    entropy: np.ndarray
    argmax: np.ndarray


def softmax_cross_entropy_with_integer_labels(
    logits,
    labels,
    axis=-1,
    where=None,
    *,
    weight=None,
    sample_weight=None,
    ignore_index=None,
    label_smoothing=0.0,
    z_loss=0.0,
    temperature=1.0,
    reduction="none",
):
    labels = np.asarray(labels)
    batch, rows, allowed = _layout(logits, axis, where)
    batch = _tempered(batch, temperature)
    losses = _zeros(labels.shape, batch, weight, sample_weight, label_smoothing, z_loss)
    counts = rows & (labels != ignore_index)
    for row in np.ndindex(labels.shape):
        if counts[row]:
            losses[row] = _scaled(
                sample_weight,
                row,
                labels.shape,
                _row_loss(batch[row], labels[row], allowed[row], weight, label_smoothing, z_loss),
            )
    denominator = mean_denominator(labels, weight=weight, sample_weight=sample_weight, where=counts)
    return _reduced(losses, reduction, denominator)


def softmax_cross_entropy(
    logits,
    labels,
    axis=-1,
    where=None,
    *,
    weight=None,
    sample_weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    temperature=1.0,
    reduction="none",
):
    batch, rows, allowed = _layout(logits, axis, where)
    batch = _tempered(batch, temperature)
    targets = _class_last(np.asarray(labels), axis)
    losses = _zeros(rows.shape, batch, labels, weight, sample_weight, label_smoothing, z_loss)
    for row in np.ndindex(rows.shape):
        if rows[row]:
            losses[row] = _scaled(
                sample_weight,
                row,
                rows.shape,
                _row_loss(batch[row], targets[row], allowed[row], weight, label_smoothing, z_loss),
            )
    denominator = mean_denominator(np.zeros(rows.shape), sample_weight=sample_weight, where=rows)
    return _reduced(losses, reduction, denominator)


def nll_loss(
    log_probs,
    labels,
    axis=-1,
    where=None,
    *,
    weight=None,
    sample_weight=None,
    ignore_index=None,
    label_smoothing=0.0,
    reduction="none",
):
    labels = np.asarray(labels)
    batch, rows, allowed = _layout(log_probs, axis, where)
    losses = _zeros(labels.shape, log_probs, weight, sample_weight, label_smoothing)
    counts = rows & (labels != ignore_index)
    for row in np.ndindex(labels.shape):
        if counts[row]:
            target = _target(labels[row], allowed[row], weight, label_smoothing)
            loss = sum(
                -t * lp if ok else np.inf
                for t, lp, ok in zip(target, batch[row], allowed[row], strict=True)
                if ok or t.real != 0
            )
            losses[row] = _scaled(sample_weight, row, labels.shape, loss)
    denominator = mean_denominator(labels, weight=weight, sample_weight=sample_weight, where=counts)
    return _reduced(losses, reduction, denominator)


def sigmoid_binary_cross_entropy(
    logits,
    labels,
    *,
    weight=None,
    pos_weight=None,
    sample_weight=None,
    where=None,
    label_smoothing=0.0,
    reduction="none",
):
    eps = label_smoothing

    def element(z, y, pos):
        # 0 * inf is 0: a side whose label is 0 adds nothing, however wrong its logit is.
        positive = pos * y * _softplus(-z) if y != 0 else 0.0
        negative = (1 - y) * _softplus(z) if y != 1 else 0.0
        return positive + negative

    return _elementwise(
        element, logits, labels, weight, pos_weight, sample_weight, where, eps, reduction
    )


def binary_cross_entropy(
    probs,
    labels,
    *,
    weight=None,
    sample_weight=None,
    where=None,
    label_smoothing=0.0,
    reduction="none",
):
    def clamped_log(p):
        return np.log(p) if p.real > np.exp(-100.0) else -100.0

    def element(p, y, _):
        return -(y * clamped_log(p) + (1 - y) * clamped_log(1 - p))

    return _elementwise(
        element, probs, labels, weight, None, sample_weight, where, label_smoothing, reduction
    )


def smooth_labels(labels, alpha, *, axis=-1, where=None):
    labels = np.asarray(labels)
    allowed = np.ones(labels.shape, bool) if where is None else np.broadcast_to(where, labels.shape)
    count = allowed.sum(axis=axis, keepdims=True)
    uniform = np.where(allowed, 1.0 / np.maximum(count, 1), 0.0)
    return (1 - alpha) * labels + alpha * uniform


def softmax_statistics(logits, labels, axis=-1, where=None, *, temperature=1.0):
    labels = np.asarray(labels)
    batch, _, allowed = _layout(logits, axis, where)
    batch = _tempered(batch, temperature)
    lse, label_logit, log_prob, entropy = (_zeros(labels.shape, batch) for _ in range(4))
    argmax = np.zeros(labels.shape, int)
    for row in np.ndindex(labels.shape):
        z, ok = batch[row], allowed[row]
        lse[row] = _lse(z[ok])
        valid = 0 <= labels[row] < z.size
        label_logit[row] = (z[labels[row]] if ok[labels[row]] else -np.inf) if valid else np.nan
        log_prob[row] = label_logit[row] - lse[row]
        entropy[row] = -sum(np.exp(v - lse[row]) * (v - lse[row]) for v in z[ok])
        argmax[row] = np.argmax(np.where(ok, z.real, -np.inf))
    return Statistics(lse, label_logit, log_prob, entropy, argmax)


def mean_denominator(labels, *, weight=None, sample_weight=None, where=None, ignore_index=None):
    labels = np.asarray(labels)
    total = 0.0
    for row in np.ndindex(labels.shape):
        if where is not None and not np.broadcast_to(where, labels.shape)[row]:
            continue
        if ignore_index is not None and labels[row] == ignore_index:
            continue
        of_class = 1.0
        if weight is not None:
            valid = 0 <= labels[row] < len(weight)
            of_class = weight[labels[row]] if valid else np.nan
        total = total + of_class * _at(sample_weight, row, labels.shape)
    return total


def vjp(function, arguments, name, cotangent, step=1e-30):
    """Gradient of <cotangent, function(**arguments)> with respect to `arguments[name]`.

    Entries that are not finite get 0: a masked class has no gradient.
    """
    x = np.asarray(arguments[name], np.float64)
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        if np.isfinite(x[index]):
            moved = x.astype(complex)
            moved[index] += 1j * step
            value = function(**{**arguments, name: moved})
            gradient[index] = np.sum(np.asarray(cotangent) * np.imag(value)) / step
    return gradient


def hessian(function, arguments, name, cotangent, step=1e-4):
    """Second derivative of <cotangent, function>: extrapolated differences of `vjp`."""
    x = np.asarray(arguments[name], np.float64)

    def gradient(index, size):
        moved = x.copy()
        moved[index] += size
        return vjp(function, {**arguments, name: moved}, name, cotangent)

    def difference(index, size):
        return (gradient(index, size) - gradient(index, -size)) / (2 * size)

    rows = [
        (4 * difference(index, step) - difference(index, 2 * step)) / 3
        for index in np.ndindex(x.shape)
    ]
    return np.reshape(rows, x.shape + x.shape)


def hessian_product(function, arguments, name, cotangent, v, step=1e-4):
    """The same Hessian times a direction `v`, which takes but four gradients."""
    x = np.asarray(arguments[name], np.float64)

    def difference(size):
        moved = ({**arguments, name: x + sign * size * v} for sign in (1, -1))
        up, down = (vjp(function, there, name, cotangent) for there in moved)
        return (up - down) / (2 * size)

    return (4 * difference(step) - difference(2 * step)) / 3


def _class_last(x, axis):
    """`x` with its class axes (in the caller's order; None is all) flattened into one last axis."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [a % x.ndim for a in axes]
    rest = [a for a in range(x.ndim) if a not in axes]
    classes = int(np.prod([x.shape[a] for a in axes]))
    return x.transpose(rest + axes).reshape([x.shape[a] for a in rest] + [classes])


def _layout(logits, axis, where):
    """Logits as [..., C], which rows count, and which classes of each row are allowed."""
    logits = np.asarray(logits)
    batch = _class_last(logits, axis)
    rows = np.ones(batch.shape[:-1], bool)
    allowed = np.asarray(batch.real != -np.inf)
    if where is not None and np.ndim(where) == logits.ndim:
        classes = _class_last(np.broadcast_to(where, logits.shape), axis)
        allowed, rows = allowed & classes, classes.any(-1)
    elif where is not None:
        rows = np.broadcast_to(where, rows.shape)
    return batch, rows, allowed


def _tempered(batch, temperature):
    """Logits by rows over a temperature, one for all rows or one for each."""
    of_row = np.broadcast_to(temperature, batch.shape[:-1])[..., None]
    banned = batch.real == -np.inf
    with np.errstate(invalid="ignore"):  # rows that do not count may hold anything
        return np.where(banned, -np.inf, np.where(banned, 0, batch) / of_row)


def _target(label, allowed, weight, smoothing):
    """The weighted, smoothed target of one row from a class id or from its probabilities."""
    target = label if np.ndim(label) else np.arange(allowed.size) == label
    if not np.ndim(label) and not 0 <= label < allowed.size:
        target = np.full(allowed.size, np.nan)
    uniform = allowed / max(allowed.sum(), 1)
    target = (1 - smoothing) * target + smoothing * uniform
    return target if weight is None else np.asarray(weight) * target


def _row_loss(z, label, allowed, weight, smoothing, z_loss):
    target = _target(label, allowed, weight, smoothing)
    highest = z[allowed].real.max(initial=-np.inf)
    if not allowed.any() or highest == np.inf:
        return np.nan
    # Both are measured from the highest logit, so that a small loss keeps its digits.
    above = np.log(np.sum(np.exp(z[allowed] - highest)))
    loss = z_loss * (above + highest) ** 2
    for t, value, ok in zip(target, z, allowed, strict=True):
        if ok:
            loss = loss + t * (above - (value - highest))
        elif t.real != 0:
            loss = np.inf
    return loss


def _lse(z):
    highest = z.real.max()
    return highest + np.log(np.sum(np.exp(z - highest)))


def _softplus(z):
    return z + np.log1p(np.exp(-z)) if z.real > 0 else np.log1p(np.exp(z))


def _elementwise(element, inputs, labels, weight, pos_weight, sample_weight, where, eps, reduction):
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    shape = inputs.shape
    losses = _zeros(shape, inputs, labels, weight, pos_weight, sample_weight, eps)
    total = 0.0
    for index in np.ndindex(shape):
        if where is not None and not np.broadcast_to(where, shape)[index]:
            continue
        y = labels[index] * (1 - eps) + eps / 2
        loss = element(inputs[index], y, _at(pos_weight, index, shape))
        loss = _at(weight, index, shape) * loss
        losses[index] = _scaled(sample_weight, index, shape, loss)
        total = total + _at(sample_weight, index, shape)
    return _reduced(losses, reduction, total)


def _zeros(shape, *inputs):
    return np.zeros(shape, complex if any(np.iscomplexobj(x) for x in inputs) else float)


def _at(weights, index, shape):
    return 1.0 if weights is None else np.broadcast_to(weights, shape)[index]


def _scaled(sample_weight, row, shape, loss):
    scale = _at(sample_weight, row, shape)
    return scale * loss if scale != 0 else 0.0


def _reduced(losses, reduction, denominator):
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / denominator if np.real(denominator) != 0 else 0.0
