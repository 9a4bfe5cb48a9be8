"""Wrong labels in the training data: what smoothing, robust losses and a known noise model do.

    python -m experiments.noisy_labels

Labels are drawn anew, before training and once for each seed, by a transition matrix: symmetric,
where every other digit is equally likely, or asymmetric, where each digit turns into the one it
resembles most. The forward correction is told this matrix, which in practice has to be estimated;
the other losses know nothing. The test labels are right.

Expect, with 60 % symmetric noise on MNIST, 70 % test accuracy of plain cross-entropy, 88 % of the
generalized one and 85 % with the correction; label smoothing does not help. With 60 % asymmetric
noise only the correction is above a third, at some 77 %.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ce_jax
from experiments.output.figures import STYLES, clean
from experiments.studies import command
from experiments.studies.report import Outcome, Record, Table, cell, values_of
from experiments.studies.training import Loss, side_by_side, single

BUDGETS = {
    "mnist": command.Budget(images=10_000, epochs=15, batch_size=100),
    "digits": command.Budget(images=1437, epochs=30, batch_size=32),
}
Noise = Literal["symmetric", "asymmetric"]
RATES = (0.0, 0.2, 0.4, 0.6)
# By the shape of handwritten digits; 2-7, 3-8, 5-6, 6-5 and 7-1 are the flips of Patrini et al.
RESEMBLES = (6, 7, 7, 8, 9, 6, 5, 1, 3, 4)


def plain(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Believes every label."""
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


def smoothed(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Believes every label to the same extent."""
    return ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, label_smoothing=0.1, reduction="mean"
    )


def generalized(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Pulls less on examples whose label the model finds unlikely."""
    log_prob = ce_jax.softmax_statistics(logits, labels).log_prob
    return jnp.mean(ce_jax.generalized_cross_entropy(log_prob, q=0.7))


def symmetric(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Adds a bounded reverse cross-entropy, the greater part."""
    log_prob = ce_jax.softmax_statistics(logits, labels).log_prob
    return jnp.mean(ce_jax.symmetric_cross_entropy(log_prob, alpha=0.1, beta=1.0, log_zero=-4.0))


def forward(logits: jax.Array, labels: jax.Array, given: dict[str, Any]) -> jax.Array:
    """Compares the labels with what the noise makes of the prediction."""
    return ce_jax.forward_corrected_cross_entropy(
        logits, labels, given["transition"], reduction="mean"
    )


# Parameters are the papers': Szegedy et al. 2016, Zhang and Sabuncu 2018, Wang et al. 2019.
LOSSES: dict[str, Loss] = {
    "plain": plain,
    "label smoothing 0.1": smoothed,
    "generalized CE, q 0.7": generalized,
    "symmetric CE, alpha 0.1, beta 1": symmetric,
    "forward correction": forward,
}


def transition(noise: Noise, rate: float) -> np.ndarray:
    """Probability of each label (column) for each true digit (row), `[10, 10]`."""
    classes = len(RESEMBLES)
    if noise == "symmetric":
        wrong = (1 - np.eye(classes)) / (classes - 1)
    else:
        wrong = np.eye(classes)[list(RESEMBLES)]
    return (1 - rate) * np.eye(classes) + rate * wrong


def corrupted(labels: np.ndarray, matrix: np.ndarray, seed: int) -> np.ndarray:
    """Draws a label for each true one by the transition matrix."""
    uniform = np.random.default_rng([seed, 1]).random(len(labels))
    # Rounding leaves the last sum a little off 1.
    limits = matrix.cumsum(1)[:, :-1]
    return (uniform[:, None] >= limits[labels]).sum(1).astype(np.int32)


def conditions() -> list[tuple[Noise, float]]:
    """Kind and rate of the noise; without noise there is but one kind."""
    return [
        (noise, rate)
        for noise in get_args(Noise)
        for rate in RATES
        if rate > 0 or noise == "symmetric"
    ]


def study(setting: command.Study) -> Outcome:
    """Trains with every loss, noise and seed, and judges by the clean test images."""
    found = setting.data
    names = list(LOSSES)
    runs, keys = [], []
    for index, name in enumerate(names):
        for noise, rate in conditions():
            matrix = transition(noise, rate)
            for seed in setting.seeds:
                rows = setting.subset(seed, len(found.train_labels))
                labels = corrupted(found.train_labels[rows], matrix, seed)
                given = {"transition": matrix.astype(np.float32)}
                runs.append(single(index, seed, rows, labels, given))
                keys.append((name, noise, rate, seed))
    logits = setting.train(LOSSES, side_by_side(runs), found.test_images).logits
    records = []
    for (name, noise, rate, seed), of_run in zip(keys, logits, strict=True):
        accuracy = float(np.mean(of_run.argmax(-1) == found.test_labels))
        for kind in get_args(Noise) if rate == 0 else (noise,):
            given_by = {"method": name, "noise": kind, "rate": rate}
            records.append(Record(given_by, seed, {"accuracy": accuracy}))
    return Outcome(
        tuple(records), table(records), {"noisy_labels": picture(records)}, {"resembles": RESEMBLES}
    )


def table(records: Sequence[Record]) -> Table:
    """Accuracy in per cent: a row for each method, a column for each noise."""
    return Table(
        (
            "test accuracy, %",
            *(
                "clean" if rate == 0 else f"{noise[:-6]}. {rate:.0%}"
                for noise, rate in conditions()
            ),
        ),
        tuple(
            (
                method,
                *(
                    cell(
                        values_of(records, "accuracy", method=method, noise=noise, rate=rate),
                        2,
                        100,
                    )
                    for noise, rate in conditions()
                ),
            )
            for method in LOSSES
        ),
    )


def picture(records: Sequence[Record]) -> Figure:
    """Accuracy against the share of wrong labels, one panel for each kind of noise."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for noise, axes in zip(get_args(Noise), panels, strict=True):
        for (color, marker), method in zip(STYLES, LOSSES, strict=False):
            values = 100 * np.array(
                [
                    values_of(records, "accuracy", method=method, noise=noise, rate=rate)
                    for rate in RATES
                ]
            )
            share = 100 * np.array(RATES)
            axes.plot(share, values.mean(1), color=color, marker=marker, markersize=5, label=method)
            axes.fill_between(
                share, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0
            )
        axes.set_title(f"{noise} noise", fontsize=10)
        axes.set_xlabel("wrong training labels (%)")
        axes.set_xticks(100 * np.array(RATES))
        clean(axes)
    panels[0].set_ylabel("test accuracy (%); band: all seeds")
    panels[0].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


app = command.make_app(
    "noisy_labels",
    "Compare losses on training labels of which up to 60 % are wrong.",
    study,
    BUDGETS,
)

if __name__ == "__main__":
    app()
