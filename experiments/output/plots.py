"""The pictures of a run, as PNG files.

Each carries the title of the run, and the notice of its data set where there is one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from experiments.output.figures import clean, save_figures
from experiments.output.report import Evaluation

_TRAIN_COLOR = "#b35806"
_TEST_COLOR = "#2166ac"
_GAP_COLOR = "#d6604d"
_MISTAKE_COLOR = "#b2182b"
# Points of accuracy that are told apart near 100 %.
_FINEST = 0.1
_ACCURACY_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 100)
# Per cent; what is below has the palest colour.
_MISTAKE_SHARES = (0.1, 100)
_HARDEST_ROWS, _HARDEST_COLUMNS = 4, 6


def save_all(
    folder: Path,
    title: str,
    notice: str,
    history: Sequence[Mapping[str, Any]],
    evaluation: Evaluation,
    images: np.ndarray,
) -> list[Path]:
    """Draws all plots of a finished run and returns their paths.

    Args:
      folder: where they go; created where missing.
      title: names the run on every plot.
      notice: a warning to show on every plot, or "".
      history: the metrics of each epoch.
      evaluation: predictions on the test set.
      images: `[n, height, width]`, the test images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": curves(history),
        "confusion": confusion(evaluation),
        "reliability": reliability(evaluation),
        "hardest": hardest(evaluation, images),
    }
    return save_figures(folder, figures, title, notice)


def curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs, on training and test examples."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, quantity, scale in ((loss_axes, "loss", 1), (accuracy_axes, "accuracy", 100)):
        for split, color, label in (
            ("train", _TRAIN_COLOR, "training (during the epoch, with dropout)"),
            ("test", _TEST_COLOR, "test (after the epoch)"),
        ):
            values = [row[f"{split}_{quantity}"] * scale for row in history]
            axes.plot(epochs, values, color=color, marker="o", markersize=3, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        clean(axes)
    loss_axes.set_ylabel("loss")
    loss_axes.set_yscale("log")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.yaxis.set_minor_locator(NullLocator())
    loss_axes.legend(frameon=False, fontsize=9)
    accuracies = [100 * row[f"{split}_accuracy"] for row in history for split in ("train", "test")]
    _accuracy_scale(accuracy_axes, min(accuracies))
    last = history[-1]
    accuracy_axes.set_title(
        f"test accuracy at the end: {100 * last['test_accuracy']:.2f} %", fontsize=10
    )
    loss_axes.set_title(f"test loss at the end: {last['test_loss']:.4f}", fontsize=10)
    return figure


def _accuracy_scale(axes: Axes, lowest: float) -> None:
    """Widens the scale towards 100 %, where the differences matter, and begins below the lowest.

    That is the training accuracy of the first epoch, measured from the untrained model on.
    """
    axes.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(_FINEST + np.maximum(100 - accuracy, 0)),
            lambda height: 100 + _FINEST - 10**-height,
        ),
    )
    axes.set_ylim(max(0, lowest - 0.2 * (100 - lowest) - _FINEST), 100)
    axes.yaxis.set_major_locator(FixedLocator(_ACCURACY_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("accuracy (%), scale widened towards 100")


def confusion(evaluation: Evaluation) -> Figure:
    """Counts of true against predicted classes; the colour of a mistake is its share of the class.

    The scale is the same for every model, so that few mistakes are pale.
    """
    counts = evaluation.confusion
    classes = len(counts)
    side = 1.4 + 0.5 * max(classes, 7)
    figure = Figure(figsize=(side + 1, side + 0.3), layout="constrained")
    axes = figure.subplots()
    mistakes = np.where(np.eye(classes, dtype=bool), 0, counts)
    shares = 100 * mistakes / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    scale = LogNorm(*_MISTAKE_SHARES, clip=True)
    image = axes.imshow(np.where(mistakes > 0, shares, np.nan), cmap="Reds", norm=scale)
    for true, predicted in np.ndindex(counts.shape):
        count = int(counts[true, predicted])
        if true == predicted:
            style: dict[str, Any] = {"color": _TEST_COLOR, "fontweight": "bold"}
        elif count == 0:
            style = {"color": "#cccccc"}
        else:
            style = {"color": "white" if scale(shares[true, predicted]) > 0.6 else "black"}
        axes.text(predicted, true, str(count), ha="center", va="center", fontsize=9, **style)
    axes.set_xticks(range(classes), evaluation.class_names)
    axes.set_yticks(range(classes), evaluation.class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("mistakes, % of the true class (logarithmic)")
    bar.ax.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{mistakes.sum()} of {counts.sum()} test images wrong", fontsize=10)
    return figure


def reliability(evaluation: Evaluation) -> Figure:
    """Accuracy against confidence, over a histogram of the confidence."""
    bins = evaluation.reliability
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = 1 / len(bins.size)
    centers = width * (np.arange(len(bins.size)) + 0.5)
    filled = bins.size > 0
    confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect")
    upper.bar(centers[filled], accuracy, width * 0.92, color="#92c5de", label="accuracy")
    upper.bar(
        centers[filled],
        confidence - accuracy,
        width * 0.92,
        bottom=accuracy,
        facecolor="none",
        edgecolor=_GAP_COLOR,
        hatch="////",
        label="gap to the confidence",
    )
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    upper.set_title(f"expected calibration error {evaluation.calibration_error:.4f}", fontsize=10)
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.bar(centers, bins.size, width * 0.92, color="#777777")
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("test images")
    lower.set_xlabel("confidence in the predicted class")
    lower.set_xlim(0, 1)
    clean(upper)
    clean(lower)
    return figure


def hardest(evaluation: Evaluation, images: np.ndarray) -> Figure:
    """The test images whose true class was given the least probability."""
    shown = np.argsort(-evaluation.nll, kind="stable")[: _HARDEST_ROWS * _HARDEST_COLUMNS]
    figure = Figure(figsize=(9, 8), layout=ConstrainedLayoutEngine(h_pad=0.12))
    grid = list(figure.subplots(_HARDEST_ROWS, _HARDEST_COLUMNS).flat)
    names = evaluation.class_names
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, index in zip(grid, shown, strict=False):
        axes.imshow(images[index], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
        true, predicted = evaluation.labels[index], evaluation.predicted[index]
        wrong = true != predicted
        verdict = f"taken for {names[predicted]}" if wrong else "recognised"
        axes.set_title(
            f"{names[true]}, {verdict}\n-log p = {evaluation.nll[index]:.2f}",
            fontsize=8.5,
            color=_MISTAKE_COLOR if wrong else "black",
        )
    return figure
