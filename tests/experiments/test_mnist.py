import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import jax
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from experiments import mnist
from experiments.data import datasets
from experiments.output import files, runs
from experiments.training.loop import Trainer
from experiments.training.objectives import LossName, make_objective
from tests.experiments.idx_files import write_all

ROOT = Path(__file__).parents[2]
REAL_MNIST = os.environ.get(datasets.DATA_DIR_VARIABLE)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.delenv(datasets.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets, "MIRRORS", ("http://127.0.0.1:9",))


def command(*options):
    """The script as a person starts it: own process, one device, warnings are errors."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "experiments.mnist", *map(str, options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stdout


def invoke(*options):
    return CliRunner().invoke(mnist.app, list(map(str, options)))


def rows(path, kind):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def without_times(row):
    return {key: value for key, value in row.items() if not key.endswith("seconds")}


def train(dataset, loss, seed, **options):
    config = mnist.new_config({"loss": loss, "seed": seed, **options}, dataset.name)
    task = dataset.parity() if loss == "even-odd" else dataset
    objective = make_objective(config.loss, task, config.label_smoothing, config.z_loss)
    trainer = Trainer(task, objective, config, jax.devices()[:1])
    state = trainer.initial_state()
    for epoch in range(config.epochs):
        state, _ = trainer.run_epoch(state, epoch)
    return trainer.evaluate(state)


@pytest.mark.slow
def test_a_run_from_the_first_line_to_the_last(tmp_path):
    out = tmp_path / "run"
    shown = finish(command("--dataset", "digits", "--out", out))
    final = rows(out, "final")[0]
    assert final["test_accuracy"] >= 0.97
    assert f"test accuracy {final['test_accuracy']:.2%}" in shown
    for text in ("digits: 1437 training", "1 x cpu", "167,178 parameters", "recall", str(out)):
        assert text in shown
    assert len(rows(out, "epoch")) == mnist.DEFAULT_EPOCHS["digits"]
    assert [row["class"] for row in final["per_class"]] == list(datasets.DIGIT_NAMES)
    assert json.loads((out / "config.json").read_text())["options"]["seed"] == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "events", "checkpoints", "plots"
    }  # fmt: skip
    assert len(list((out / "plots").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("one-hot", {"label_smoothing": 0.1, "z_loss": 1e-4}),
        ("one-vs-rest", {}),
        ("even-odd", {}),
        ("weighted", {}),
    ],
)
def test_every_loss_learns_the_digits(loss, options):
    assert train(datasets.load_digits(), loss, 0, **options).accuracy >= 0.97


def kill_when(process, reached):
    """Kills the process with SIGKILL as soon as `reached()` holds."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    options = ("--dataset", "digits", "--epochs", 5, "--seed", 3)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    finish(command(*options, "--out", unbroken))

    checkpoints = killed / "checkpoints"
    # Before the first epoch, and then while a checkpoint is being written.
    kill_when(command(*options, "--out", killed), (killed / "config.json").exists)
    process = command("--out", killed, "--resume")
    kill_when(process, lambda: any(checkpoints.glob("3.*")))
    shown = finish(command(*options, "--out", killed, "--resume"))

    assert "resuming after epoch" in shown
    assert list(map(without_times, rows(killed, "epoch"))) == list(
        map(without_times, rows(unbroken, "epoch"))
    )
    assert without_times(rows(killed, "final")[0]) == without_times(rows(unbroken, "final")[0])


@pytest.fixture
def begun(tmp_path):
    """A run of two short epochs on the digits that stand in for a missing MNIST."""
    out = tmp_path / "begun"
    result = invoke("--epochs", 2, "--batch-size", 256, "--out", out)
    assert result.exit_code == 0, result.output
    assert "NOT MNIST" in result.output
    return out


def test_what_stands_in_for_mnist_says_so_for_good(begun):
    for kind in ("run", "final"):
        assert "NOT MNIST" in rows(begun, kind)[0]["notice"]
    assert json.loads((begun / "config.json").read_text())["options"]["dataset"] == "digits"

    # Resuming a finished run trains nothing and says the same.
    final = rows(begun, "final")
    result = invoke("--dataset", "auto", "--out", begun, "--resume")
    assert result.exit_code == 0, result.output
    assert "resuming after epoch 2 of 2" in result.output
    assert "NOT MNIST" in result.output
    assert list(map(without_times, rows(begun, "final"))) == list(map(without_times, final))

    result = invoke("--out", begun, "--resume", "--data-dir", begun)
    assert result.exit_code == 1
    assert "is on digits; leave out --data-dir" in result.stderr

    result = invoke("--out", begun)
    assert result.exit_code == 1
    assert "not empty; name another --out" in result.stderr

    result = invoke("--out", begun, "--resume", "--seed", 5, "--loss", "one-hot", "--epochs", 2)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {begun}: the run in it has other options:",
        "  --loss: then softmax, now one-hot",
        "  --seed: then 0, now 5",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "hinge"], "--loss"),
        (["--dataset", "cifar"], "--dataset"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--learning-rate", "0"], "--learning-rate has to be positive, not 0.0"),
        (["--learning-rate", "nan"], "--learning-rate has to be finite, not nan"),
        (["--label-smoothing", "1.5"], "--label-smoothing"),
        (["--z-loss", "-1"], "--z-loss"),
        (["--z-loss", "inf"], "--z-loss has to be finite, not inf"),
        (["--z-loss", "1", "--loss", "even-odd"], "--z-loss belongs to the softmax losses"),
        (["--dropout", "1"], "--dropout 1 would leave nothing"),
        (["--resume"], "--resume needs the folder of the run"),
        (["--dataset", "digits", "--data-dir", "x"], "--data-dir is for MNIST"),
        (["--learning_rate", "1"], "--learning_rate"),
    ],
)
def test_wrong_options_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke(*options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def one_line(result):
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_missing_data_is_one_line_that_says_what_to_do(tmp_path):
    out = tmp_path / "out"
    assert "--data-dir or $MNIST_DIR" in one_line(invoke("--dataset", "mnist", "--out", out))
    message = one_line(invoke("--data-dir", tmp_path / "absent", "--out", out))
    assert f"{tmp_path / 'absent'}: no such folder" in message
    assert not out.exists()


def test_damaged_data_is_one_line_that_names_the_file(tmp_path):
    write_all(tmp_path / "small")
    message = one_line(invoke("--data-dir", tmp_path / "small", "--out", tmp_path / "out"))
    assert str(tmp_path / "small" / "train-images-idx3-ubyte.gz") in message
    assert not (tmp_path / "out").exists()


def test_an_unusable_folder_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        for resume in ([], ["--resume"]):
            message = one_line(invoke("--dataset", "digits", "--out", out, *resume))
            assert str(out) in message


def test_there_has_to_be_a_run_to_resume(tmp_path):
    message = one_line(invoke("--dataset", "digits", "--out", tmp_path / "absent", "--resume"))
    assert f"{tmp_path / 'absent'}: no such folder, so there is no run to resume" in message
    assert "leave --resume out" in one_line(invoke("--out", tmp_path, "--resume"))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_training_set_is_one_line(tmp_path):
    out = tmp_path / "run"
    message = one_line(invoke("--dataset", "digits", "--batch-size", 1438, "--out", out))
    assert "--batch-size 1438 is above 1437, the number of training images of digits" in message
    assert not out.exists()


def test_a_class_that_is_never_predicted_has_no_precision(tmp_path):
    """One step of the largest batch there is leaves some out."""
    options = ("--dataset", "digits", "--batch-size", 1437, "--epochs", 1)
    result = invoke(*options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert re.search(r"│ +- │", result.output)
    assert "nan" not in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "goes_on"),
    [("write_whole", False), ("_append", True), ("_save", True), ("savefig", True)],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, broken, goes_on):
    """Wherever it is noticed: the configuration, the metrics, a checkpoint, the pictures."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    options = ("--dataset", "digits", "--epochs", 1, "--batch-size", 512, "--out", out)
    where = {"write_whole": files, "savefig": Figure}.get(broken, runs.RunFolder)
    with monkeypatch.context() as patch:
        patch.setattr(where, broken, full)
        message = one_line(invoke(*options))
    assert f"{out}: " in message
    assert "No space left on device" in message
    assert (f"Make room on the disk. --out {out} --resume goes on" in message) == goes_on
    result = invoke(*options, *(["--resume"] if goes_on else []))
    assert result.exit_code == 0, result.output
    assert len(rows(out, "final")) == len(rows(out, "epoch")) == 1


def test_resuming_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "holds no run to resume" in one_line(invoke("--out", tmp_path, "--resume"))
    (tmp_path / "config.json").write_text("{}")
    assert "not the configuration" in one_line(invoke("--out", tmp_path, "--resume"))


def test_help_names_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = invoke("--help").output
    for option in (
        "--loss", "--label-smoothing", "--z-loss", "--epochs", "--batch-size", "--learning-rate",
        "--weight-decay", "--dropout", "--seed", "--dataset", "--data-dir", "--out", "--resume",
    ):  # fmt: skip
        assert option in shown
    for loss in get_args(LossName):
        assert f"{loss}:" in shown


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MNIST, reason=f"{datasets.DATA_DIR_VARIABLE} names no folder of MNIST")
def test_the_real_mnist_is_learned():
    dataset = datasets.read_mnist(Path(REAL_MNIST))
    assert train(dataset, "softmax", 0).accuracy >= 0.984
