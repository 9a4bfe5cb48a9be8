"""Real processes on this machine compute what one does, and none outlives another's failure."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments import language_model, launch, mnist
from experiments.data import datasets
from experiments.output import runs
from experiments.output.errors import RunError
from experiments.processes import group
from experiments.training.loop import Trainer, fit, make_mesh
from experiments.training.objectives import make_objective

ROOT = Path(__file__).parents[2]

# Seconds. What the documentation promises, and what no test may take.
LOCAL_END, CLUSTER_END, LIMIT = 5, 40, 300

# Compiling is most of the work here.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "error",
}


@pytest.fixture
def compiled_alike():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def start():
    """Starts Python programs, and kills those that are left at the end."""
    with contextlib.ExitStack() as stack:
        # A shell has jobs in the background ignore it, and they pass that on to what they start.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, before)

        def start(*arguments, **variables):
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=ENVIRONMENT | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(end, process)
            return process

        yield start


@pytest.fixture
def launched(start):
    return functools.partial(start, "-m", "experiments.launch")


def end(process):
    """Kills a process and its workers, of which one may be stopped, if they still run."""
    with contextlib.suppress(FileNotFoundError):
        for pid in workers(process):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def finish(process, *statuses, limit=LIMIT):
    """Standard output and error of a process that ends in time with one of these statuses, or 0."""
    output, errors = process.communicate(timeout=limit)
    assert process.returncode in (statuses or (0,)), output + errors
    return output, errors


def workers(launcher):
    """The process ids of a launcher's workers, in their order."""
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return sorted(map(int, found))


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(reached, *launchers):
    deadline = time.monotonic() + LIMIT
    while not reached():
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def losses(path):
    """The losses of each epoch, or report."""
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "train_loss", "test_loss")
    return [[row[n] for n in names if n in row] for row in rows if row["kind"] == "epoch"]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_alike")
def test_mnist_broken_and_resumed_ends_as_in_one_process(launched, tmp_path):
    out = tmp_path / "run"
    options = {"epochs": 12, "batch_size": 256}
    job = ["mnist", "--dataset", "digits", "--epochs", 12, "--batch-size", 256, "--out", out]

    # Two launchers, as on a cluster, until one machine falls silent while the other waits for data.
    address = free_address()
    one, two = (
        launched("--coordinator", address, "--processes", 2, "--process-id", number, *job)
        for number in range(2)
    )
    wait_until((out / "checkpoints" / "2").exists, one, two)
    silent = workers(two)[0]
    os.kill(silent, signal.SIGSTOP)
    # An exception where it waits by a barrier, JAX's abort where it waits for data.
    _, errors = finish(one, 1, 128 + signal.SIGABRT, limit=CLUSTER_END)
    assert "Task 1 heartbeat timeout" in errors or "stopped sending heartbeats" in errors
    assert re.search(r"error: process 0 of 2 .*\. The same command with --resume goes on", errors)
    os.kill(silent, signal.SIGKILL)
    _, errors = finish(two, 128 + signal.SIGKILL, limit=LOCAL_END)
    assert "process 1 of 2 was killed by SIGKILL. The same command with --resume goes" in errors

    output, _ = finish(launched("--processes", 2, *job, "--resume"))
    assert int(re.search(r"resuming after epoch (\d+) of 12", output)[1]) < 12
    assert "devices  2 x cpu (cpu) of 2 processes" in output
    assert all(line.startswith(("[0]", "[1] [Gloo]")) for line in output.splitlines())
    assert len(list((out / "plots").iterdir())) == 4

    dataset = datasets.load_digits()
    config = mnist.new_config(options, dataset.name)
    trainer = Trainer(dataset, make_objective("softmax", dataset), config, jax.devices()[:1])
    with runs.RunFolder(tmp_path / "one", {}) as folder:
        fit(trainer, folder, lambda row: None)
    np.testing.assert_allclose(losses(out), losses(tmp_path / "one"), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient", "compiled_alike")
def test_a_language_model_spread_over_processes_learns_as_on_one_device(launched, tmp_path):
    """Its head's width over the two processes, its classes over the two devices of each."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 128)) * 4)
    job = ["language_model", "--text", text, "--length", 8, "--steps", 20, "--batch-size", 8]
    job += ["--tensor-parallel", 2, "--parts", 2, "--out", tmp_path / "run"]
    output, _ = finish(launched("--processes", 2, "--cpu-devices", 2, *job))
    assert "4 x cpu (cpu) of 2 processes; batch over 2, classes over 2" in output

    config = language_model.Config(20, 8, 8, 2, 3e-3, True, 0)
    rows = language_model.rows_of(text.read_bytes(), 8)
    trainer = language_model.Trainer(config, 1, jax.devices()[:1])
    with runs.RunFolder(tmp_path / "one", {}) as folder:
        language_model.fit(trainer, rows, folder, Console(quiet=True))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=2e-6)


@pytest.fixture
def pair(launched):
    """A launcher and the process ids of its two workers."""
    launcher = launched("--processes", 2, "mnist", "--dataset", "digits")
    wait_until(lambda: len(workers(launcher)) == 2, launcher)
    return launcher, workers(launcher)


@pytest.mark.slow
def test_a_killed_process_ends_the_job(pair):
    launcher, pids = pair
    os.kill(pids[1], signal.SIGKILL)
    _, errors = finish(launcher, 128 + signal.SIGKILL, limit=LOCAL_END)
    assert "error: process 1 of 2 was killed by SIGKILL; process 0 of 2 was ended.\n" in errors
    assert not any(map(is_running, pids))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_told_to_end_ends_the_job(pair, number):
    launcher, pids = pair
    launcher.send_signal(number)
    _, errors = finish(launcher, 128 + number, limit=LOCAL_END)
    assert f"error: {number.name}: all processes were ended. The same command with" in errors
    assert not any(map(is_running, pids))


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(pair):
    launcher, pids = pair
    launcher.kill()
    finish(launcher, -signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.slow
def test_who_meets_nobody_says_so_in_time(launched):
    address = free_address()
    one = ("--coordinator", address, "--processes", 2, "--process-id", 1)
    slurm = {
        "SLURM_JOB_ID": "4095",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    }
    limit = ("--start-timeout", 2, "mnist")
    lonely = launched(*one, *limit), launched("--coordinator", "auto", *limit, **slurm)
    wanted = ("process 1 of 2", address), ("the process on this machine", "the address JAX found")
    for launcher, (name, place) in zip(lonely, wanted, strict=True):
        _, errors = finish(launcher, 128 + signal.SIGABRT, limit=60)
        assert (
            f"error: {name} was killed by SIGABRT. It had not met the others at {place}" in errors
        )


@pytest.mark.slow
def test_no_cluster_to_be_found(launched):
    _, errors = finish(launched("--coordinator", "auto", "mnist"), 1)
    assert "error: cannot join the other processes: coordinator_address" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_the_status_of_a_failing_process_is_kept(launched):
    _, errors = finish(launched("--processes", 1, "mnist", "--epochs", 0), 2)
    assert "[0]" not in errors
    assert "Invalid value for '--epochs'" in errors
    assert "error: process 0 of 1 ended with status 2.\n" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_the_job(tmp_path):
    """As when it goes to a file on a full disk: one line, and nobody waits for the others."""
    command = ["--processes", "2", "mnist", "--dataset", "digits", "--out", str(tmp_path / "run")]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.launch", *command],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "error: what the processes print cannot be written, so all of them were ended: No space"
    )


@pytest.mark.slow
def test_the_example_of_the_documentation(start, tmp_path):
    page = (ROOT / "docs/many_devices.md").read_text("utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert "\npython train.py localhost:12345 0 & python train.py localhost:12345 1\n" in page
    (tmp_path / "train.py").write_text(code)
    address = free_address()
    pair = [start(tmp_path / "train.py", address, number) for number in range(2)]
    wanted = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert wanted
    for process in pair:
        output, _ = finish(process)
        assert [line for line in output.splitlines() if not line.startswith("[Gloo]")] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mnist"], "--processes has to say how many"),
        (["--processes", 0, "mnist"], "--processes"),
        (["--processes", 2, "cifar"], "cifar"),
        (["--processes", 2, "--process-id", 0, "mnist"], "--process-id belongs to --coordinator"),
        (["--coordinator", "host", "mnist"], "has to be HOST:PORT or auto, not host"),
        (["--coordinator", "host:0", "mnist"], "has to be HOST:PORT or auto, not host:0"),
        (["--coordinator", "host:1", "--processes", 2, "mnist"], "needs --processes and"),
        (
            ["--coordinator", "host:1", "--processes", 2, "--process-id", 2, "mnist"],
            "has to be below 2, the number of processes, not 2",
        ),
        (["--coordinator", "auto", "--processes", 2, "mnist"], "auto finds --processes and"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, options, message):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(launch.app, list(map(str, options)))
    assert result.exit_code == 2
    assert message in result.stderr


def test_windows_has_all_the_signals_that_are_named(monkeypatch):
    for name in set(signal.Signals.__members__) - {"SIGABRT", "SIGINT", "SIGTERM"}:
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(sys, "platform", "win32")
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(launch.supervise, "run", lambda *_, **__: None)
    result = CliRunner().invoke(launch.app, ["--processes", "2", "mnist"])
    assert result.exit_code == 0, result.exception
    assert set(handled) <= {signal.SIGINT, signal.SIGTERM}


def devices(*of_processes):
    return [SimpleNamespace(process_index=process) for process in of_processes]


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(RunError, match="--batch-size 33 is not a multiple of the number of proc"):
        make_mesh(33, devices(0, 0, 1, 1))
    config = language_model.Config(1, 8, 9, 3, 1e-3, True, 0)
    with pytest.raises(RunError, match="these have to share 3 rows evenly"):
        language_model.make_mesh(config, 1, devices(0, 1))


def test_work_is_shared_by_equally_many_devices_of_each_process():
    two, three = devices(0, 0), devices(1, 1, 1)
    assert group.sharing([*two, *three], lambda count: 8 % count == 0) == [*two, *three[:2]]
    assert group.sharing([*two, *three], lambda count: 6 % count == 0) == [two[0], three[0]]
    assert group.sharing([*two, *three], lambda count: 7 % count == 0) == []


def test_processes_that_differ_are_named(monkeypatch):
    def of_three(own):
        return np.stack([own, own, own + np.asarray([0, 1], np.uint32)])

    monkeypatch.setattr(group.multihost_utils, "process_allgather", of_three)
    with pytest.raises(RunError, match="process 2 has not the same data as process 0"):
        group.require_agreement({"options": 1, "data": 2})
