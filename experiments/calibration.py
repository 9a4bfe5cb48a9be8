"""Whether probabilities are right: label smoothing, z-loss, and a temperature fitted afterwards.

    python -m experiments.calibration

Each model is judged twice, as it comes from training and with its logits divided by the temperature
that `ce_jax.fit_temperature` finds on training images which were held out. That changes confidences
and no prediction.

Expect a calibration error of 1.6 % on MNIST for plain cross-entropy, 13 % after label smoothing and
0.6 % with a z-loss of 0.01; scaled by its temperature, each model has about 0.5 %.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ce_jax
from experiments.output.figures import clean
from experiments.studies import command
from experiments.studies.report import Column, Outcome, Record, by_method
from experiments.studies.training import Loss, side_by_side, single

BUDGETS = {
    "mnist": command.Budget(images=10_000, epochs=30, batch_size=100),
    "digits": command.Budget(images=1150, epochs=60, batch_size=32),
}
# The last training images serve the temperature alone.
HELD_OUT = {"mnist": 5000, "digits": 287}
BINS = 15

COLUMNS = (
    Column("accuracy", "accuracy, %"),
    Column("ece", "ECE, %"),
    Column("adaptive_ece", "adaptive ECE, %"),
    Column("brier", "Brier score", 4, 1.0),
    Column("nll", "NLL, nats", 4, 1.0),
    Column("temperature", "temperature", 3, 1.0),
)


def loss_of(
    logits: jax.Array,
    labels: jax.Array,
    given: dict[str, Any],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> jax.Array:
    """Cross-entropy with the options of a method."""
    return ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, label_smoothing=label_smoothing, z_loss=z_loss, reduction="mean"
    )


# Smoothing as in Szegedy et al. 2016, z-loss as in Chowdhery et al. 2022 and 100 times as much.
LOSSES: dict[str, Loss] = {
    "plain": loss_of,
    "label smoothing 0.1": functools.partial(loss_of, label_smoothing=0.1),
    "z-loss 0.0001": functools.partial(loss_of, z_loss=1e-4),
    "z-loss 0.01": functools.partial(loss_of, z_loss=1e-2),
}
SCALED = ", scaled"


@jax.jit
def figures(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Accuracy, and errors of the probabilities that the logits stand for."""
    confidence, correct = predictions(logits, labels)
    return {
        "accuracy": jnp.mean(correct, dtype=jnp.float32),
        "ece": ce_jax.expected_calibration_error(confidence, correct, bins=BINS),
        "adaptive_ece": ce_jax.expected_calibration_error(
            confidence, correct, bins=BINS, adaptive=True
        ),
        "brier": ce_jax.brier_score(logits, labels, reduction="mean"),
        "nll": ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean"),
    }


def predictions(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probability of the predicted class, and whether it is the true one."""
    found = ce_jax.softmax_statistics(logits, logits.argmax(-1))
    return jnp.exp(found.log_prob), found.argmax == labels


def study(setting: command.Study) -> Outcome:
    """Trains with every loss and seed, fits temperatures, and judges by the test images."""
    found = setting.data
    held_out = HELD_OUT[found.name]
    available = len(found.train_labels) - held_out
    names = list(LOSSES)
    runs = []
    for index in range(len(names)):
        for seed in setting.seeds:
            rows = setting.subset(seed, available)
            runs.append(single(index, seed, rows, found.train_labels[rows]))
    judged = np.concatenate([found.train_images[available:], found.test_images])
    logits = setting.train(LOSSES, side_by_side(runs), judged).logits
    records, test_logits = [], {}
    for run, of_run in zip(runs, logits, strict=True):
        name, seed = names[int(run.loss)], int(run.seed)
        fitting, testing = of_run[:held_out], of_run[held_out:]
        temperature = float(ce_jax.fit_temperature(fitting, found.train_labels[available:]))
        for method, divisor in ((name, 1.0), (name + SCALED, temperature)):
            scaled = testing / np.float32(divisor)
            values = {key: float(x) for key, x in figures(scaled, found.test_labels).items()}
            values["temperature"] = divisor
            records.append(Record({"method": method}, seed, values))
            test_logits[method, seed] = scaled
    return Outcome(
        tuple(records),
        by_method(records, COLUMNS),
        {"calibration": picture(test_logits, found.test_labels)},
        {"held_out": held_out, "bins": BINS},
    )


def picture(logits: dict[tuple[str, int], np.ndarray], labels: np.ndarray) -> Figure:
    """Reliability diagrams over histograms of confidence, all seeds together."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    grid = figure.subplots(2, len(LOSSES), sharex=True, sharey="row", height_ratios=[2.2, 1])
    looks = (
        ("", "#b2182b", "o", "as trained"),
        (SCALED, "#2166ac", "s", "scaled"),
    )
    for name, (upper, lower) in zip(LOSSES, grid.T, strict=True):
        upper.plot([0, 1], [0, 1], "--", color="#777777", linewidth=1, label="calibrated")
        for suffix, color, marker, label in looks:
            confidence, correct = pooled(logits, name + suffix, labels)
            bins = ce_jax.reliability_bins(confidence, correct, bins=BINS)
            # The accuracy of a handful of predictions says nothing.
            shown = np.asarray(bins.size) >= 10
            upper.plot(
                np.asarray(bins.confidence)[shown],
                np.asarray(bins.accuracy)[shown],
                color=color,
                marker=marker,
                markersize=4,
                label=label,
            )
            share = np.asarray(bins.size) / len(confidence)
            lower.stairs(100 * share, np.linspace(0, 1, BINS + 1), color=color, linewidth=1.4)
        upper.set_title(name, fontsize=10)
        lower.set_xlabel("confidence")
        lower.set_yscale("log")
        clean(upper)
        clean(lower)
    grid[0, 0].set_ylabel(f"accuracy in each of {BINS} bins")
    grid[0, 0].set_ylim(0, 1.02)
    grid[0, 0].legend(frameon=False, fontsize=9, loc="lower right")
    grid[1, 0].set_ylabel("test images (%)")
    grid[1, 0].yaxis.set_major_formatter("{x:g}")
    grid[1, 0].set_xlim(0, 1)
    return figure


def pooled(
    logits: dict[tuple[str, int], np.ndarray], method: str, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and success of a method with all seeds."""
    parts: Sequence[tuple[jax.Array, jax.Array]] = [
        predictions(jnp.asarray(of_run), jnp.asarray(labels))
        for (name, _), of_run in logits.items()
        if name == method
    ]
    confidence, correct = zip(*parts, strict=True)
    return np.concatenate(confidence), np.concatenate(correct)


app = command.make_app(
    "calibration",
    "Compare how well the probabilities of differently trained models are calibrated.",
    study,
    BUDGETS,
)

if __name__ == "__main__":
    app()
