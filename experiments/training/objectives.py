"""What a classifier can be trained for: a loss of `ce_jax` and the probabilities it implies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import ce_jax
from ce_jax import Ratio
from experiments.data.datasets import Dataset

LossName = Literal["softmax", "one-hot", "one-vs-rest", "even-odd", "weighted"]
SIGMOID_LOSSES = ("one-vs-rest", "even-odd")


@dataclass(frozen=True)
class Objective:
    """A loss on the logits of a classifier and how to read a prediction off them.

    Attributes:
      description: one line for people.
      outputs: how many logits the model has to give per example.
      loss: maps logits `[n, outputs]`, labels `[n]` and a mask `[n]` of the rows that count to the
        loss over them as a `Ratio`, so that sums over batches give exact means.
      log_probs: maps logits to the log-probability of each class, `[n, classes]`.
    """

    description: str
    outputs: int
    loss: Callable[[jax.Array, jax.Array, jax.Array], Ratio]
    log_probs: Callable[[jax.Array], jax.Array]


def make_objective(
    name: LossName, dataset: Dataset, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Objective:
    """Returns the objective of that name for the classes of a data set.

    Args:
      name: which loss; "even-odd" wants a data set of two classes (`Dataset.parity`).
      dataset: gives the number of classes and, for "weighted", how often each occurs.
      label_smoothing: in [0, 1].
      z_loss: not negative; the losses on sigmoids have no use for it and refuse it.
    """
    classes = len(dataset.class_names)
    if name in SIGMOID_LOSSES and z_loss != 0:
        raise ValueError(f"z_loss belongs to the softmax losses, {name} cannot use it")

    if name == "softmax" or name == "weighted":
        weight = None
        description = "softmax cross-entropy, integer labels"
        if name == "weighted":
            # Every class counts alike in the sum over the data set, however rare it is.
            counts = np.bincount(dataset.train_labels, minlength=classes)
            weight = ce_jax.balanced_weights(counts)
            description = "softmax cross-entropy, classes weighted by inverse frequency"

        def integer_loss(logits: jax.Array, labels: jax.Array, where: jax.Array) -> Ratio:
            return ce_jax.softmax_cross_entropy_with_integer_labels(
                logits,
                labels,
                where=where,
                weight=weight,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                reduction="ratio",
            )

        return Objective(description, classes, integer_loss, jax.nn.log_softmax)

    if name == "one-hot":

        def one_hot_loss(logits: jax.Array, labels: jax.Array, where: jax.Array) -> Ratio:
            return ce_jax.softmax_cross_entropy(
                logits,
                jax.nn.one_hot(labels, classes, dtype=logits.dtype),
                where=where,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                reduction="ratio",
            )

        return Objective(
            "softmax cross-entropy, one-hot labels", classes, one_hot_loss, jax.nn.log_softmax
        )

    if name == "one-vs-rest":

        def one_vs_rest_loss(logits: jax.Array, labels: jax.Array, where: jax.Array) -> Ratio:
            total = ce_jax.sigmoid_binary_cross_entropy(
                logits,
                jax.nn.one_hot(labels, classes, dtype=logits.dtype),
                where=jnp.broadcast_to(where[:, None], logits.shape),
                label_smoothing=label_smoothing,
                reduction="sum",
            )
            # Summed over the classes, averaged over the examples: the cost of all questions asked
            # about an image.
            return Ratio(total, ce_jax.mean_denominator(labels, where=where))

        return Objective(
            "one sigmoid cross-entropy per class, n-hot labels",
            classes,
            one_vs_rest_loss,
            jax.nn.log_sigmoid,
        )

    if name == "even-odd":
        if classes != 2:
            raise ValueError(f"even-odd tells two classes apart, {dataset.name} has {classes}")

        def even_odd_loss(logits: jax.Array, labels: jax.Array, where: jax.Array) -> Ratio:
            return ce_jax.sigmoid_binary_cross_entropy(
                logits[:, 0],
                labels.astype(logits.dtype),
                where=where,
                label_smoothing=label_smoothing,
                reduction="ratio",
            )

        def even_odd_log_probs(logits: jax.Array) -> jax.Array:
            return jax.nn.log_sigmoid(jnp.concatenate([-logits, logits], axis=-1))

        return Objective(
            "binary sigmoid cross-entropy, even or odd", 1, even_odd_loss, even_odd_log_probs
        )

    raise ValueError(f"unknown loss {name!r}")
