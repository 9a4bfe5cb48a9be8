"""Classes from frequent to 100 times rarer: what weights, focal loss and logit adjustment do.

    python -m experiments.imbalance

The training images are thinned out to an exponential profile, as Cui et al. (2019) do with CIFAR:
of digit 0 all that a class may have, of each further digit fewer, of digit 9 a hundredth. The test
images stay as they are, and the measure is the accuracy averaged over classes.

Expect 90.3 % for plain cross-entropy on MNIST, 91.7 % with balanced weights and 93.1 % with logit
adjustment, in training or afterwards; focal loss does not help.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ce_jax
from experiments.output.figures import STYLES, clean
from experiments.studies import command
from experiments.studies.report import Column, Outcome, Record, by_method, values_of
from experiments.studies.training import Loss, side_by_side, single

# Images of the most frequent class; the smallest class of MNIST has 5421, of the digits about 140.
BUDGETS = {
    "mnist": command.Budget(images=5000, epochs=30, batch_size=100),
    "digits": command.Budget(images=5000, epochs=60, batch_size=32),
}
RATIO = 100
GROUP = 3  # classes that count as head, and as tail

COLUMNS = (
    Column("balanced_accuracy", "balanced accuracy, %"),
    Column("head_accuracy", "frequent classes (0-2), %"),
    Column("tail_accuracy", "rare classes (7-9), %"),
)


def plain(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Every example counts alike."""
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


def balanced(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Classes weighted by inverse frequency."""
    weight = ce_jax.balanced_weights(given["counts"])
    return ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, weight=weight, reduction="mean"
    )


def effective_number(
    logits: jax.Array, labels: jax.Array, given: dict[str, Any], *, beta: float
) -> jax.Array:
    """Classes weighted by the inverse of their effective number of examples."""
    weight = ce_jax.effective_number_weights(given["counts"], beta=beta)
    return ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, weight=weight, reduction="mean"
    )


def focal(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Examples that are right already count less."""
    log_prob = ce_jax.softmax_statistics(logits, labels).log_prob
    return jnp.mean(ce_jax.focal_loss(log_prob, gamma=2.0))


def logit_adjusted(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Rare classes need a larger margin."""
    offset = ce_jax.training_logit_offset(given["counts"])
    return plain(logits + offset[None, :], labels, given)


# Parameters are those of the papers; of the two beta, Cui et al. use both.
LOSSES: dict[str, Loss] = {
    "plain": plain,
    "balanced weights": balanced,
    "effective number, beta 0.999": functools.partial(effective_number, beta=0.999),
    "effective number, beta 0.9999": functools.partial(effective_number, beta=0.9999),
    "focal, gamma 2": focal,
    "logit adjustment, training": logit_adjusted,
}
POST_HOC = "logit adjustment, post-hoc"


def profile(available: np.ndarray, most: int, ratio: float = RATIO) -> np.ndarray:
    """How many images each class keeps, `[classes]`: a geometric sequence from first to last.

    Args:
      available: `[classes]` images there are.
      most: what the first class keeps at most; no more than the smallest class has.
      ratio: of the first to the last.
    """
    head = min(most, int(available.min()))
    shares = float(ratio) ** -np.linspace(0, 1, len(available))
    return np.maximum(1, np.round(head * shares)).astype(np.int32)


def thinned(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of the images that are kept, as many of each class as counted."""
    draw = np.random.default_rng([seed, 0])
    rows = [
        draw.permutation(np.flatnonzero(labels == name))[:count]
        for name, count in enumerate(counts)
    ]
    return np.concatenate(rows).astype(np.int32)


def figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy within each class, and its mean over all of them, the first and the last ones."""
    right = logits.argmax(-1) == labels
    recall = np.bincount(labels, right) / np.bincount(labels)
    return {
        "balanced_accuracy": float(recall.mean()),
        "head_accuracy": float(recall[:GROUP].mean()),
        "tail_accuracy": float(recall[-GROUP:].mean()),
        **{f"accuracy_{name}": float(value) for name, value in enumerate(recall)},
    }


def study(setting: command.Study) -> Outcome:
    """Trains with every loss and seed, and judges by the test images."""
    found = setting.data
    counts = profile(np.bincount(found.train_labels), setting.images)
    setting.console.print(f"training images by class: {', '.join(map(str, counts))}")
    names = list(LOSSES)
    runs = []
    for index in range(len(names)):
        for seed in setting.seeds:
            rows = thinned(found.train_labels, counts, seed)
            labels = found.train_labels[rows]
            runs.append(single(index, seed, rows, labels, {"counts": counts}))
    logits = setting.train(LOSSES, side_by_side(runs), found.test_images).logits
    offset = np.asarray(ce_jax.prediction_logit_offset(counts))
    records = []
    for run, of_run in zip(runs, logits, strict=True):
        name, seed = names[int(run.loss)], int(run.seed)
        records.append(Record({"method": name}, seed, figures(of_run, found.test_labels)))
    for run, of_run in zip(runs, logits, strict=True):
        if names[int(run.loss)] == "plain":
            adjusted = figures(of_run + offset, found.test_labels)
            records.append(Record({"method": POST_HOC}, int(run.seed), adjusted))
    return Outcome(
        tuple(records),
        by_method(records, COLUMNS),
        {"imbalance": picture(records, counts)},
        {"counts": counts.tolist()},
    )


def picture(records: Sequence[Record], counts: np.ndarray) -> Figure:
    """Balanced accuracy of each method, and accuracy by class."""
    methods = [*LOSSES, POST_HOC]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    for index, method in enumerate(methods):
        color, marker = STYLES[index]
        values = 100 * np.array(values_of(records, "balanced_accuracy", method=method))
        left.plot(values, [index] * len(values), ".", color=color, alpha=0.45)
        left.plot(values.mean(), index, marker, color=color, markersize=8)
        by_class = [
            100 * np.mean(values_of(records, f"accuracy_{name}", method=method))
            for name in range(len(counts))
        ]
        right.plot(by_class, color=color, marker=marker, markersize=4.5, label=method)
    left.set_yticks(range(len(methods)), methods)
    left.invert_yaxis()
    left.set_xlabel("balanced test accuracy (%); small: single seeds")
    right.set_xticks(range(len(counts)), [f"{name}\n{count}" for name, count in enumerate(counts)])
    right.set_xlabel("digit, and its training images")
    right.set_ylabel("test accuracy of the digit (%)")
    right.legend(frameon=False, fontsize=8.5, loc="lower left")
    for axes in (left, right):
        clean(axes)
    return figure


app = command.make_app(
    "imbalance", "Compare losses on classes whose frequencies differ 100:1.", study, BUDGETS
)

if __name__ == "__main__":
    app()
