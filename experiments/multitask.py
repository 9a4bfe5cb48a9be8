"""Two tasks of different units in one network: fixed weights against learnt ones.

    python -m experiments.multitask

Every image is turned by a random angle. From the same hidden layer the network tells the digit, by
cross-entropy, and the angle in degrees, by half the squared error, which begins a hundred times
larger. Somebody has to choose what a square degree is worth, or `ce_jax.uncertainty_weighted_loss`
learns it while training (Kendall et al. 2018).

Expect, on MNIST, 88.8 % of the digits right and a mean error of 7.7 degrees from equal weights,
93.5 % and 8.3 degrees from learnt ones, 93.5 % and 7.8 degrees from the best of five fixed ones.
"""

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
from experiments.studies.training import Loss, Trained, side_by_side, single

BUDGETS = {
    "mnist": command.Budget(images=10_000, epochs=30, batch_size=100),
    "digits": command.Budget(images=1437, epochs=60, batch_size=32),
}
MAX_DEGREES = 45.0
DIGITS = 10
LEARNT = "uncertainty weights"
# Weights of the digit's and the angle's loss.
FIXED = {
    "digit alone": (1.0, 0.0),
    "angle alone": (0.0, 1.0),
    "1 : 1": (1.0, 1.0),
    "1 : 0.1": (1.0, 0.1),
    "1 : 0.01": (1.0, 0.01),
    "1 : 0.001": (1.0, 0.001),
    "1 : 0.0001": (1.0, 0.0001),
}
# Adam moves a log-variance by about this much in a step: enough to cross some units within the
# first epochs, where the network's own rate would not get there.
LEARNT_RATE = 0.02

COLUMNS = (
    Column("digit_accuracy", "digit, accuracy in %"),
    Column("angle_error", "angle, mean absolute error in degrees", 2, 1.0),
)


def task_losses(outputs: jax.Array, targets: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The loss of each task: of ten logits, and of the angle that comes after them."""
    digit = ce_jax.softmax_cross_entropy_with_integer_labels(
        outputs[:, :DIGITS], targets["digit"], reduction="mean"
    )
    angle = jnp.mean(jnp.square(outputs[:, DIGITS] - targets["angle"])) / 2
    return {"digit": digit, "angle": angle}


def fixed(outputs: jax.Array, targets: dict[str, jax.Array], given: dict[str, Any]) -> jax.Array:
    """A sum with the weights of the run."""
    found = task_losses(outputs, targets)
    return given["weights"][0] * found["digit"] + given["weights"][1] * found["angle"]


def uncertain(
    outputs: jax.Array, targets: dict[str, jax.Array], given: dict[str, Any]
) -> jax.Array:
    """Weights that are learnt; as a start the sum."""
    return ce_jax.uncertainty_weighted_loss(given["log_variances"], task_losses(outputs, targets))


LOSSES: dict[str, Loss] = {"fixed": fixed, LEARNT: uncertain}


@jax.jit
def turned(images: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turns each image counter-clockwise about its centre, with bilinear interpolation.

    Args:
      images: uint8 `[n, height, width]`.
      degrees: `[n]`.
    """
    height, width = images.shape[1:]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)[:, None, None]
    down, right = jnp.mgrid[:height, :width].astype(jnp.float32) - centre

    def of_one(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, angle = both
        sin, cos = jnp.sin(jnp.deg2rad(angle)), jnp.cos(jnp.deg2rad(angle))
        source = jnp.stack([cos * down + sin * right, cos * right - sin * down]) + centre
        values = jax.scipy.ndimage.map_coordinates(
            image.astype(jnp.float32), list(source), order=1, mode="constant"
        )
        return jnp.round(values).astype(jnp.uint8)

    return jax.lax.map(of_one, (images, degrees), batch_size=500)


def drawn(images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images turned at random, and by how many degrees."""
    draw = np.random.default_rng([seed, 2])
    degrees = draw.uniform(-MAX_DEGREES, MAX_DEGREES, len(images)).astype(np.float32)
    return np.asarray(turned(images, degrees)), degrees


def figures(outputs: np.ndarray, digits: np.ndarray, degrees: np.ndarray) -> dict[str, float]:
    """How well each of the tasks is done."""
    return {
        "digit_accuracy": float(np.mean(outputs[:, :DIGITS].argmax(-1) == digits)),
        "angle_error": float(np.mean(np.abs(outputs[:, DIGITS] - degrees))),
    }


def study(setting: command.Study) -> Outcome:
    """Trains with all weights and seeds, and judges by the test images, turned as well."""
    found = setting.data
    # The same angles for all seeds, which differ in the choice of images.
    images, degrees = drawn(found.train_images, 0)
    test_images, test_degrees = drawn(found.test_images, 1)
    runs, keys = [], []
    for method in (*FIXED, LEARNT):
        for seed in setting.seeds:
            rows = setting.subset(seed, len(images))
            targets = {"digit": found.train_labels[rows], "angle": degrees[rows]}
            given = {"weights": np.array(FIXED.get(method, (1.0, 1.0)), np.float32)}
            start = {"log_variances": {"digit": np.float32(0), "angle": np.float32(0)}}
            runs.append(single(int(method == LEARNT), seed, rows, targets, given, start))
            keys.append((method, seed))
    trained = setting.train(
        LOSSES,
        side_by_side(runs),
        test_images,
        images=images,
        outputs=DIGITS + 1,
        learnt_rate=LEARNT_RATE,
    )
    records = tuple(
        Record({"method": method}, seed, figures(outputs, found.test_labels, test_degrees))
        for (method, seed), outputs in zip(keys, trained.logits, strict=True)
    )
    weights = learnt_weights(trained, [method == LEARNT for method, _ in keys])
    return Outcome(
        records,
        by_method(records, COLUMNS),
        {"multitask": picture(records, weights)},
        {"learnt_weights": {task: values[:, -1].tolist() for task, values in weights.items()}},
    )


def learnt_weights(trained: Trained, chosen: Sequence[bool]) -> dict[str, np.ndarray]:
    """The factor of each task's loss after every step, `[runs, steps]`, of the chosen runs."""
    variances = trained.learnt["log_variances"]
    return {task: np.exp(-values[np.array(chosen)]) for task, values in variances.items()}


def picture(records: Sequence[Record], weights: dict[str, np.ndarray]) -> Figure:
    """What each choice of weights makes of both tasks, and how the learnt ones develop."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = [method for method in (*FIXED, LEARNT) if "alone" not in method]
    for (color, marker), method in zip(STYLES, methods, strict=False):
        error = values_of(records, "angle_error", method=method)
        accuracy = 100 * np.array(values_of(records, "digit_accuracy", method=method))
        name = method if method == LEARNT else f"fixed, {method}"
        left.plot(error, accuracy, ".", color=color, alpha=0.45)
        left.plot(np.mean(error), accuracy.mean(), marker, color=color, markersize=9, label=name)
    alone = 100 * np.mean(values_of(records, "digit_accuracy", method="digit alone"))
    left.axhline(alone, color="#777777", linestyle="--", linewidth=1, label="digit alone")
    alone = np.mean(values_of(records, "angle_error", method="angle alone"))
    left.axvline(alone, color="#777777", linestyle=":", linewidth=1.4, label="angle alone")
    left.set_xlabel("angle: mean absolute test error (degrees)")
    left.set_ylabel("digit: test accuracy (%); small: single seeds")
    left.legend(frameon=False, fontsize=9)
    names = {"digit": "digit, per nat", "angle": "angle, per square degree"}
    for (color, _), (task, name) in zip(STYLES[1:], names.items(), strict=False):
        values = weights[task]
        steps = np.arange(1, values.shape[1] + 1)
        right.plot(steps, np.exp(np.log(values).mean(0)), color=color, label=name)
        right.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    right.set_yscale("log")
    right.set_xlabel("training step")
    right.set_ylabel("learnt weight of the loss; band: all seeds")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        clean(axes)
    return figure


app = command.make_app(
    "multitask",
    "Compare fixed with learnt weights of two tasks: which digit, and by what angle turned?",
    study,
    BUDGETS,
)

if __name__ == "__main__":
    app()
