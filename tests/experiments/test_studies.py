"""The studies: their data, their figures against NumPy, and each command from end to end."""

import csv
import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from experiments import calibration, imbalance, multitask, noisy_labels
from experiments.data import datasets
from experiments.output.errors import RunError
from experiments.studies import command, report, training
from experiments.studies.training import side_by_side, single, train
from experiments.training.loop import Recipe

pytestmark = pytest.mark.usefixtures("cheap_programs")

STUDIES = {
    "imbalance": imbalance,
    "noisy_labels": noisy_labels,
    "calibration": calibration,
    "multitask": multitask,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.delenv(datasets.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "MIRRORS", ("http://127.0.0.1:9",))


def invoke(name, *options):
    return CliRunner().invoke(STUDIES[name].app, list(map(str, options)))


def random_logits(seed, count=300):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.int32)
    logits = rng.normal(size=(count, 10)).astype(np.float32) * 2
    logits[np.arange(count), labels] += 2
    return logits, labels


def test_the_profile_is_geometric():
    counts = imbalance.profile(np.full(10, 6000), 5000)
    # Cui et al. 2019: n_max * 100**(-c / 9).
    np.testing.assert_array_equal(counts, [5000, 2997, 1797, 1077, 646, 387, 232, 139, 83, 50])
    assert imbalance.profile(np.array([700, 60, 400]), 5000).tolist() == [60, 6, 1]


def test_thinning_keeps_as_many_as_the_profile_says():
    labels = np.random.default_rng(0).integers(0, 10, 4000)
    counts = imbalance.profile(np.bincount(labels), 200)
    rows = imbalance.thinned(labels, counts, seed=3)
    assert len(set(rows)) == len(rows) == counts.sum()
    np.testing.assert_array_equal(np.bincount(labels[rows]), counts)
    assert set(rows) != set(imbalance.thinned(labels, counts, seed=4))


def test_accuracy_by_class_is_averaged_over_classes():
    logits, labels = random_logits(0)
    labels[:250] = 0  # one class outnumbers the others
    recall = [np.mean(logits[labels == c].argmax(-1) == c) for c in range(10)]
    found = imbalance.figures(logits, labels)
    np.testing.assert_allclose(found["balanced_accuracy"], np.mean(recall))
    np.testing.assert_allclose(found["head_accuracy"], np.mean(recall[:3]))
    np.testing.assert_allclose(found["tail_accuracy"], np.mean(recall[7:]))
    np.testing.assert_allclose([found[f"accuracy_{c}"] for c in range(10)], recall)


@pytest.mark.parametrize("noise", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_labels_are_wrong_at_the_rates_of_the_matrix(noise, rate):
    matrix = noisy_labels.transition(noise, rate)
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(np.diag(matrix), 1 - rate)
    assert np.linalg.matrix_rank(matrix) == 10
    truth = np.random.default_rng(0).integers(0, 10, 200_000)
    found = noisy_labels.corrupted(truth, matrix, seed=1)
    shares = np.bincount(truth * 10 + found, minlength=100).reshape(10, 10)
    shares = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(shares, matrix, atol=0.015)  # 20,000 of each class: 4 deviations
    assert np.all(shares[matrix == 0] == 0)


def test_without_noise_no_label_changes():
    truth = np.random.default_rng(0).integers(0, 10, 1000)
    for noise in ("symmetric", "asymmetric"):
        matrix = noisy_labels.transition(noise, 0.0)
        np.testing.assert_array_equal(noisy_labels.corrupted(truth, matrix, seed=0), truth)


def calibration_truth(logits, labels):
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    order = np.argsort(confidence, kind="stable")
    groups = {
        "ece": [np.ceil(confidence * 15) == b for b in range(1, 16)],
        "adaptive_ece": list(order.reshape(15, -1)),
    }
    gaps = {
        key: sum(abs(np.sum(correct[group].astype(float) - confidence[group])) for group in members)
        / len(labels)
        for key, members in groups.items()
    }
    return {
        "accuracy": np.mean(correct),
        **gaps,
        "brier": np.mean(np.sum((p - np.eye(10)[labels]) ** 2, -1)),
        "nll": -np.mean(np.log(p[np.arange(len(labels)), labels])),
    }


def test_calibration_figures():
    logits, labels = random_logits(1)
    found = calibration.figures(jnp.asarray(logits), jnp.asarray(labels))
    wanted = calibration_truth(logits, labels)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-5, err_msg=key)


def test_images_are_turned_about_their_centre():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5)).astype(np.uint8)
    found = np.asarray(multitask.turned(images, np.array([0, 90, 180, -90], np.float32)))
    for image, original, quarters in zip(found, images, (0, 1, 2, 3), strict=True):
        np.testing.assert_array_equal(image, np.rot90(original, quarters))


def test_random_turns_are_within_the_limits_and_repeatable():
    images = np.zeros((500, 4, 4), np.uint8)
    (_, first), (_, again), (_, other) = (multitask.drawn(images, seed) for seed in (0, 0, 1))
    assert 40 < np.abs(first).max() <= multitask.MAX_DEGREES
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_task_figures():
    outputs = np.random.default_rng(0).normal(size=(50, 11)).astype(np.float32)
    digits = np.arange(50) % 10
    degrees = np.linspace(-40, 40, 50)
    found = multitask.figures(outputs, digits, degrees)
    right = outputs[:, :10].argmax(1) == digits
    np.testing.assert_allclose(found["digit_accuracy"], np.mean(right))
    np.testing.assert_allclose(found["angle_error"], np.mean(np.abs(outputs[:, 10] - degrees)))
    targets = {"digit": jnp.asarray(digits), "angle": jnp.asarray(degrees, jnp.float32)}
    losses = multitask.task_losses(jnp.asarray(outputs), targets)
    squared = np.square(outputs[:, 10] - degrees)
    np.testing.assert_allclose(losses["angle"], np.mean(squared) / 2, rtol=1e-5)
    z = outputs[:, :10].astype(float)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(50), digits]
    np.testing.assert_allclose(losses["digit"], nll.mean(), rtol=1e-5)
    given = {
        "weights": jnp.array([0.5, 2.0]),
        "log_variances": {"digit": jnp.float32(0.4), "angle": jnp.float32(6)},
    }
    for loss, by_digit, by_angle, rest in (
        (multitask.fixed, 0.5, 2.0, 0.0),
        (multitask.uncertain, np.exp(-0.4), np.exp(-6.0), 3.2),
    ):
        wanted = by_digit * nll.mean() + by_angle * np.mean(squared) / 2 + rest
        np.testing.assert_allclose(loss(outputs, targets, given), wanted, rtol=1e-5)


def test_means_and_spreads():
    assert report.cell([0.5, 0.7, 0.6], 1, 100.0) == "60.0 ± 10.0"
    assert report.cell([0.5], 3) == "0.500"
    records = [
        report.Record({"method": method, "rate": 0.2}, seed, {"x": value})
        for method, seed, value in [("a", 1, 4.0), ("a", 0, 2.0), ("b", 0, 9.0)]
    ]
    assert report.values_of(records, "x", method="a", rate=0.2) == [2.0, 4.0]
    assert report.summary(records) == [
        {"method": "a", "rate": 0.2, "x": {"mean": 3.0, "spread": pytest.approx(2**0.5)}},
        {"method": "b", "rate": 0.2, "x": {"mean": 9.0, "spread": None}},
    ]


def rows_of(folder):
    with (folder / report.CSV_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_each_study_from_end_to_end(name, tmp_path):
    """Quickly, on what stands in for MNIST; the files agree with each other."""
    out = tmp_path / "out"
    result = invoke(name, "--quick", "--seeds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    for text in ("NOT MNIST", "QUICK", f"{name} on digits, 2 epochs, 2 seeds", str(out)):
        assert text in result.output
    assert {path.name for path in out.iterdir()} == {
        "results.csv", "results.json", "table.md", f"{name}.png"
    }  # fmt: skip
    assert 10_000 < (out / f"{name}.png").stat().st_size < 150_000
    found = json.loads((out / "results.json").read_text())
    assert "NOT MNIST" in found["notice"]
    assert "QUICK" in found["notice"]
    assert found["versions"]["jax"] == jax.__version__
    assert found["options"]["seeds"] == 2
    rows = rows_of(out)
    for entry in found["results"]:
        names = [key for key, value in entry.items() if not isinstance(value, dict)]
        mine = [row for row in rows if all(row[key] == str(entry[key]) for key in names)]
        assert sorted(row["seed"] for row in mine) == ["0", "1"]
        for key in entry.keys() - set(names):
            a, b = (float(row[key]) for row in mine)
            np.testing.assert_allclose(entry[key]["mean"], (a + b) / 2, rtol=1e-12)
            np.testing.assert_allclose(entry[key]["spread"], abs(a - b) / 2**0.5, atol=1e-12)
    table = (out / "table.md").read_text()
    methods = dict.fromkeys(entry["method"] for entry in found["results"])
    assert [line.split(" | ")[0] for line in table.splitlines()[6:]] == [f"| {m}" for m in methods]


def near_one(logits, labels, given):
    """Wants the label's logit, times a factor to be learnt, to be 1."""
    of_label = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jnp.square(1 - given["factor"] * of_label))


def constant(logits, labels, given):
    """Wants the first logit to be some number."""
    return jnp.mean(jnp.square(given["constant"] - logits[:, 0]))


def small_runs(seeds, wanted=7.0):
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 3)).astype(np.uint8)
    rows = np.arange(60, dtype=np.int32)
    given, learnt = {"constant": np.float32(wanted)}, {"factor": np.float32(2)}
    runs = [single(loss, seed, rows, rows % 4, given, learnt) for loss in (0, 1) for seed in seeds]
    recipe = Recipe(20, 20, 0.01, 0.0)
    losses = (near_one, constant)
    return train(losses, recipe, images, side_by_side(runs), images, outputs=4, learnt_rate=0.1)


@pytest.mark.slow
def test_runs_are_trained_by_their_own_loss_and_seed():
    found = small_runs((0, 1))
    assert found.logits.shape == (4, 60, 4)
    assert found.losses.shape == found.learnt["factor"].shape == (4, 60)
    off = np.abs(found.logits[:, :, 0] - 7).mean(1)
    assert np.all(off[2:] < 1)
    assert np.all(off[:2] > 2)
    assert np.all(found.losses[:, -1] < 0.2 * found.losses[:, 0])
    # What a loss does not use is not learnt.
    assert np.all(np.abs(found.learnt["factor"][:2, -1] - 2) > 0.1)
    np.testing.assert_array_equal(found.learnt["factor"][2:], 2)
    assert np.abs(found.logits[0] - found.logits[1]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, found, small_runs((0, 1)))
    # Nor does it matter what is trained beside it.
    swapped = small_runs((1, 0))
    np.testing.assert_allclose(swapped.logits[[1, 0, 3, 2]], found.logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(RunError, match="not finite in epoch 1"):
        small_runs((0, 1), wanted=np.inf)


@pytest.mark.parametrize("name", STUDIES)
def test_help_names_every_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = invoke(name, "--help").output
    for option in ("--seeds", "--epochs", "--dataset", "--data-dir", "--out", "--quick"):
        assert option in shown
    assert f"runs/{name}-DATE-TIME" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--epochs", "-1"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--dataset", "cifar"], "--dataset"),
        (["--dataset", "digits", "--data-dir", "x"], "--data-dir is for MNIST"),
    ],
)
def test_wrong_options_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("imbalance", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def one_line(result):
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_what_cannot_be_used_is_one_line(tmp_path):
    out = tmp_path / "out"
    assert "--data-dir or $MNIST_DIR" in one_line(
        invoke("calibration", "--dataset", "mnist", "--out", out)
    )
    message = one_line(invoke("multitask", "--data-dir", tmp_path / "absent", "--out", out))
    assert f"{tmp_path / 'absent'}: no such folder" in message
    assert not out.exists()
    (tmp_path / "file").touch()
    for folder, text in (
        (tmp_path, "not empty; name another --out"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "file" / "run", str(tmp_path / "file")),
        ("/proc/run", "/proc/run"),
    ):
        assert text in one_line(invoke("imbalance", "--dataset", "digits", "--out", folder))


def test_too_few_images_for_a_batch_are_an_error(monkeypatch, tmp_path):
    budget = imbalance.BUDGETS["digits"]
    assert budget.batch_size == 32
    monkeypatch.setattr(imbalance, "profile", lambda available, most: np.ones(10, np.int32))
    message = one_line(invoke("imbalance", "--dataset", "digits", "--out", tmp_path / "out"))
    assert "10 training images do not fill a batch of 32" in message


def test_an_interrupt_is_one_line(monkeypatch, tmp_path):
    def interrupt(available, most):
        raise KeyboardInterrupt

    monkeypatch.setattr(imbalance, "profile", interrupt)
    result = invoke("imbalance", "--dataset", "digits", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.startswith("error: interrupted. A study writes its results at its end")


@pytest.mark.parametrize("place", ["results", "pictures"])
def test_a_full_disk_is_one_line_after_the_results(monkeypatch, tmp_path, place):
    """What took minutes to compute can be read, though it cannot be written."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = [report.Record({"method": "a method"}, 0, {"x": 0.25})]
    outcome = report.Outcome(
        tuple(records), report.by_method(records, [report.Column("x", "heading")]), {}, {}
    )
    figure = Figure()
    if place == "results":
        monkeypatch.setattr(os, "fsync", full)
    else:
        figure.savefig = full
    outcome = dataclasses.replace(outcome, figures={"picture": figure})
    app = command.make_app("a study", "purpose", lambda _: outcome, imbalance.BUDGETS)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["--dataset", "digits", "--out", str(out)])
    message = one_line(result)
    assert f"{out}: No space left on device. Make room on the disk. A study writes" in message
    assert "a method" in result.output
    assert "25.00" in result.output
    if place == "results":
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("count", [1, 6, 8])
def test_images_that_do_not_fill_a_batch_are_judged_as_they_are(count, monkeypatch):
    """No image is left out, none is counted twice, whatever number is looked at together."""
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 3)).astype(np.uint8)
    runs = side_by_side([single(0, seed, np.arange(8), np.arange(8) % 4) for seed in (0, 1)])
    recipe = Recipe(1, 5, 0.01, 0.0)  # of 8 images a batch of 5: 3 wait

    def look(at_once):
        monkeypatch.setattr(training, "_JUDGED_AT_ONCE", at_once)
        jax.clear_caches()
        return train((wrong_label,), recipe, images, runs, images[:count], outputs=4)

    found, whole = look(3), look(8)
    assert found.logits.shape == (2, count, 4)
    assert found.losses.shape == (2, 1)
    np.testing.assert_allclose(found.logits, whole.logits, rtol=1e-5, atol=1e-6)


def wrong_label(logits, labels, given):
    """Wants the label's logit to fall."""
    return jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))
