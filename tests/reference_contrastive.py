"""The truth of the contrastive losses: the whole matrix of pairs, in float64 NumPy, row by row.

As in `reference`, everything runs on complex numbers too, so that `reference.vjp` differentiates.
"""

import numpy as np

from tests import reference


def info_nce_loss(
    queries, keys, where=None, *, logit_scale=1.0, sample_weight=None, reduction="none"
):
    exists = _exists(where, queries)
    columns = np.append(exists, np.ones(len(keys) - len(queries), bool))
    z = logit_scale * _products(queries, exists, keys, columns)
    return _reduced(_of_own_column(z, columns), exists, sample_weight, reduction)


def clip_loss(images, texts, where=None, *, logit_scale=1.0, sample_weight=None, reduction="none"):
    exists = _exists(where, images)
    z = logit_scale * _products(images, exists, texts, exists)
    both = (_of_own_column(z, exists) + _of_own_column(z.T, exists)) / 2
    return _reduced(both, exists, sample_weight, reduction)


def siglip_loss(
    images,
    texts,
    where=None,
    *,
    logit_scale=1.0,
    logit_bias=0.0,
    sample_weight=None,
    reduction="none",
):
    exists = _exists(where, images)
    z = logit_scale * _products(images, exists, texts, exists) + logit_bias
    z = (1 - 2 * np.eye(len(z))) * z
    losses = [sum((reference._softplus(x) for x in row[exists]), 0 * row.sum()) for row in z]
    return _reduced(np.array(losses), exists, sample_weight, reduction)


def supervised_contrastive_loss(
    embeddings, labels, where=None, *, logit_scale=1.0, sample_weight=None, reduction="none"
):
    exists = _exists(where, embeddings)
    z = logit_scale * _products(embeddings, exists, embeddings, exists)
    losses, counts = [], []
    for i, row in enumerate(z):
        others = exists & (np.arange(len(row)) != i)
        positives = others & (labels == labels[i])
        counts.append(bool(exists[i] and positives.any()))
        nothing = 0 * row[i]
        losses.append(np.mean(_surprise(row, others)[positives]) if counts[i] else nothing)
    return _reduced(np.array(losses), np.array(counts, bool), sample_weight, reduction)


def _exists(where, rows):
    return np.ones(len(rows), bool) if where is None else np.broadcast_to(where, len(rows))


def _products(rows, row_exists, columns, column_exists):
    return np.where(row_exists[:, None], rows, 0) @ np.where(column_exists[:, None], columns, 0).T


def _surprise(row, among):
    """-log softmax of a row, over some of its columns."""
    highest = row[among].real.max()
    return np.log(np.sum(np.exp(row[among] - highest))) - (row - highest)


def _of_own_column(z, columns):
    return np.array([_surprise(row, columns)[i] if columns[i] else 0 for i, row in enumerate(z)])


def _reduced(losses, counts, sample_weight, reduction):
    scaled = [
        reference._scaled(sample_weight, (i,), losses.shape, loss) if counts[i] else 0.0
        for i, loss in enumerate(losses)
    ]
    denominator = reference.mean_denominator(losses, sample_weight=sample_weight, where=counts)
    return reference._reduced(np.array(scaled), reduction, denominator)
