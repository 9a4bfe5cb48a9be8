import matplotlib.image
import numpy as np
import pytest

from experiments.output import plots
from experiments.output.report import Evaluation

NAMES = ("a", "b", "c", "d")


def evaluation(count=400, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    # Labels drawn from the probabilities: a calibrated classifier.
    labels = (rng.random((count, 1)) > np.exp(log_probs).cumsum(axis=1)).sum(axis=1)
    labels = np.minimum(labels, classes - 1)
    return Evaluation(0.5, log_probs.astype(np.float32), labels.astype(np.int32), NAMES[:classes])


def test_figures_agree_with_their_definitions():
    found = evaluation()
    probs = np.exp(np.float64(found.log_probs))
    pairs = [
        (int(label), int(row.argmax())) for label, row in zip(found.labels, probs, strict=True)
    ]
    for true in range(4):
        for predicted in range(4):
            assert found.confusion[true, predicted] == pairs.count((true, predicted))
    assert found.accuracy == sum(true == predicted for true, predicted in pairs) / 400
    losses = -np.log([row[label] for label, row in zip(found.labels, probs, strict=True)])
    np.testing.assert_allclose(found.summary["test_nll"], np.mean(losses), rtol=1e-6)
    for label, row in enumerate(found.per_class):
        right = pairs.count((label, label))
        examples = sum(true == label for true, _ in pairs)
        predicted = sum(predicted == label for _, predicted in pairs)
        precision, recall = right / predicted, right / examples
        f1 = 2 / (1 / precision + 1 / recall)
        wanted = {"precision": precision, "recall": recall, "f1": f1, "examples": examples}
        wanted["nll"] = np.mean(losses[found.labels == label])
        assert row.pop("class") == NAMES[label]
        assert row == pytest.approx(wanted, rel=1e-6)


def test_a_figure_that_would_divide_by_zero_is_none():
    log_probs = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]))
    _, never_predicted, never_true = Evaluation(
        0.0, log_probs, np.array([0, 1, 0]), NAMES[:3]
    ).per_class
    assert never_predicted["examples"] == 1
    assert np.isnan(never_predicted["precision"])
    assert never_predicted["recall"] == never_predicted["f1"] == 0
    assert never_true["examples"] == never_true["precision"] == never_true["f1"] == 0
    assert all(np.isnan(never_true[key]) for key in ("recall", "nll"))
    absent = Evaluation(0.0, log_probs[:2], np.array([0, 0]), NAMES[:3]).per_class[2]
    assert absent["examples"] == 0
    assert all(np.isnan(absent[key]) for key in ("precision", "recall", "f1", "nll"))


def test_calibration_of_a_worked_example():
    log_probs = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    of_bets = Evaluation(0.0, log_probs, np.array([0, 1, 0, 0]), NAMES[:2])
    found = of_bets.reliability
    filled = found.size > 0
    np.testing.assert_allclose(found.confidence[filled], [0.6, 0.9])
    np.testing.assert_allclose(found.accuracy[filled], [1.0, 0.5])
    np.testing.assert_allclose(of_bets.calibration_error, (0.4 + 0.4) / 2)


def test_calibration_error_is_small_for_a_calibrated_classifier():
    assert evaluation(count=20_000).calibration_error < 0.02


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("notice", ["", "NOT MNIST"])
def test_plots_are_pictures(tmp_path, classes, notice):
    found = evaluation(classes=classes)
    history = [
        {"epoch": epoch, **dict.fromkeys(("train_loss", "test_loss"), 1.0 / epoch)}
        | dict.fromkeys(("train_accuracy", "test_accuracy"), 1 - 0.5 / epoch)
        for epoch in (1, 2, 3)
    ]
    images = np.random.default_rng(0).integers(0, 255, (400, 8, 8), np.uint8)
    paths = plots.save_all(tmp_path / "plots", "a title", notice, history, found, images)
    assert [path.name for path in paths] == [
        "curves.png", "confusion.png", "reliability.png", "hardest.png"
    ]  # fmt: skip
    for path in paths:
        picture = matplotlib.image.imread(path)[..., :3]
        # The notice is white on red, at the bottom.
        red = np.all(np.abs(picture - np.array([0xB2, 0x18, 0x2B]) / 255) < 0.02, axis=-1)
        assert (red[-picture.shape[0] // 12 :].sum() > 500) == bool(notice)


def test_plots_of_a_perfect_and_a_tiny_test_set(tmp_path):
    log_probs = np.log(np.full((3, 3), 0.005) + 0.985 * np.eye(3))
    found = Evaluation(0.1, log_probs, np.arange(3), NAMES[:3])
    row = dict.fromkeys(("train_loss", "test_loss"), 0.1)
    row |= dict.fromkeys(("train_accuracy", "test_accuracy"), 1.0)
    images = np.zeros((3, 8, 8), np.uint8)
    assert len(plots.save_all(tmp_path, "t", "", [{"epoch": 1, **row}], found, images)) == 4


def history_of(accuracies):
    return [
        {"epoch": epoch, "train_loss": 0.1, "test_loss": 0.1}
        | {"train_accuracy": train, "test_accuracy": test}
        for epoch, (train, test) in enumerate(accuracies, 1)
    ]


@pytest.mark.parametrize(
    "accuracies", [[(0.78, 0.956), (0.95, 0.97), (1, 1)], [(0, 0.05)], [(1, 1)], [(0.3, 0.9)] * 3]
)
def test_curves_show_every_epoch(accuracies):
    figure = plots.curves(history_of(accuracies))
    figure.draw_without_rendering()
    axes = figure.axes[1]
    low, high = axes.get_ylim()
    shown = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    np.testing.assert_allclose(sorted(shown), sorted(100 * np.ravel(accuracies)))
    assert max(0, low) <= shown.min()
    assert shown.max() <= high
    heights = axes.transData.transform([(1, 90), (1, 98), (1, 100)])[:, 1]
    assert heights[2] - heights[1] > heights[1] - heights[0] > 0


def test_few_mistakes_are_pale_and_the_colours_have_a_key():
    labels = np.repeat([0, 1], 1000)
    predicted = labels.copy()
    predicted[:3], predicted[1000:1500] = 1, 0
    log_probs = np.log(np.where(np.eye(2)[predicted] > 0, 0.9, 0.1))
    figure = plots.confusion(Evaluation(0.1, log_probs, labels, NAMES[:2]))
    axes, key = figure.axes
    (image,) = axes.images
    shares = image.get_array()
    np.testing.assert_allclose(shares[[0, 1], [1, 0]], [0.3, 50.0])
    assert shares.mask[0, 0]
    few, many = image.norm(0.3), image.norm(50.0)
    assert few < 0.2
    assert many > 0.85
    assert "% of the true class" in key.get_ylabel()
    # The same scale for a model that makes no mistake worse than that.
    predicted[1000:1500] = 1
    log_probs = np.log(np.where(np.eye(2)[predicted] > 0, 0.9, 0.1))
    axes, _ = plots.confusion(Evaluation(0.1, log_probs, labels, NAMES[:2])).axes
    assert axes.images[0].norm(0.3) == few


@pytest.mark.parametrize("side", [8, 28])
def test_the_title_keeps_its_distance_from_the_hardest_images(tmp_path, monkeypatch, side):
    drawn = {}
    hardest = plots.hardest
    monkeypatch.setattr(plots, "hardest", lambda *a: drawn.setdefault("figure", hardest(*a)))
    images = np.random.default_rng(0).integers(0, 255, (400, side, side), np.uint8)
    plots.save_all(tmp_path, "a title", "", history_of([(0.5, 0.5)]), evaluation(), images)
    figure = drawn["figure"]
    figure.draw_without_rendering()
    title = figure.get_suptitle()
    assert title == "a title"
    (text,) = [t for t in figure.texts if t.get_text() == title]
    below = max(axes.title.get_window_extent().y1 for axes in figure.axes)
    assert text.get_window_extent().y0 - below > 8 * figure.dpi / 72
