import errno
import json
import logging
import os
import shutil
import signal
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments.output import files, runs
from experiments.output.errors import RunError

HEADER = {"dataset": "digits", "notice": "a notice"}


def state(value):
    return {"w": jnp.full((3, 2), value, jnp.float32)}


def metrics_rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def scalars(path):
    """Step and value of each `loss` in the TensorBoard events, read from the record format."""
    found = []
    for file in (path / "events").iterdir():
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found += [
                (event.step, value.simple_value)
                for value in event.summary.value
                if value.tag == "loss"
            ]
    return found


def record(path, epochs):
    with runs.RunFolder(path, HEADER) as folder:
        for epoch in epochs:
            folder.record_epoch({"loss": 1.0 / epoch}, state(epoch))


def test_a_run_is_continued(tmp_path):
    record(tmp_path, [1, 2, 3])
    with runs.RunFolder(tmp_path, HEADER) as folder:
        assert folder.epochs_done == 3
        assert [row["epoch"] for row in folder.history] == [1, 2, 3]
        np.testing.assert_array_equal(folder.restore(state(0.0))["w"], np.full((3, 2), 3.0))
        folder.record_epoch({"loss": 0.25}, state(4))
        folder.record_final({"loss": 0.25})
    rows = metrics_rows(tmp_path)
    assert rows[0] == {"kind": "run", **HEADER}
    assert [row.get("epoch") for row in rows[1:]] == [1, 2, 3, 4, None]
    assert rows[-1] == {"kind": "final", "loss": 0.25}
    assert sorted(scalars(tmp_path)) == [
        (1, 1.0), (2, 0.5), (3, np.float32(1 / 3)), (4, 0.25)
    ]  # fmt: skip


@pytest.mark.parametrize("tail", ["", '{"kind": "ep', '{"kind": "epoch", "epoch": 4}\n', "\0\0"])
def test_what_lies_beyond_the_checkpoint_is_cut_off(tmp_path, tail):
    record(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    record(tmp_path, [])
    assert [row.get("epoch") for row in metrics_rows(tmp_path)] == [None, 1, 2]
    assert [step for step, _ in sorted(scalars(tmp_path))] == [1, 2]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    record(tmp_path, [1, 2])
    done = tmp_path / "checkpoints" / "2"
    os.rename(done, f"{done}.orbax-checkpoint-tmp")
    with runs.RunFolder(tmp_path, HEADER) as folder:
        assert folder.epochs_done == 1
        folder.record_epoch({"loss": 0.5}, state(2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_lost_metrics_are_an_error(tmp_path):
    record(tmp_path, [1, 2])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: damaged, it lacks some of the 2 epochs"):
        runs.RunFolder(tmp_path, HEADER)


def test_a_damaged_checkpoint_is_named(tmp_path):
    record(tmp_path, [1, 2])
    for file in (tmp_path / "checkpoints" / "2").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"damaged")
    with runs.RunFolder(tmp_path, HEADER) as folder, pytest.raises(RunError) as error:
        folder.restore(state(0.0))
    assert str(error.value).startswith(str(tmp_path / "checkpoints" / "2"))


def test_figures_that_json_lacks_become_null(tmp_path):
    with runs.RunFolder(tmp_path, HEADER) as folder:
        folder.record_final({"loss": float("nan"), "per_class": [{"f1": float("inf")}]})
    assert metrics_rows(tmp_path)[-1] == {
        "kind": "final", "loss": None, "per_class": [{"f1": None}]
    }  # fmt: skip


def test_a_new_run_wants_an_empty_folder(tmp_path):
    runs.create(tmp_path / "new" / "run", {"seed": 1})
    assert runs.read_config(tmp_path / "new" / "run") == {"seed": 1}
    with pytest.raises(RunError, match=r"run: not empty; name another --out, or .* --resume"):
        runs.create(tmp_path / "new" / "run", {"seed": 1})


def test_only_a_run_can_be_resumed(tmp_path):
    """A folder of anything else is no reason to write --resume."""
    (tmp_path / "notes").touch()
    with pytest.raises(RunError) as raised:
        runs.require_fresh(tmp_path)
    assert "--resume" not in str(raised.value)


def test_a_kill_before_the_first_write_leaves_a_fresh_folder(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"se')
    runs.create(tmp_path, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_no_run_yet(tmp_path):
    with pytest.raises(RunError, match="absent: no such folder, so there is no run to resume"):
        runs.read_config(tmp_path / "absent")
    with pytest.raises(RunError, match=r"holds no run to resume .*; leave --resume"):
        runs.read_config(tmp_path)


def test_other_options_are_named_one_by_one(tmp_path):
    then = {"seed": 0, "batch_size": 32, "tied": True}
    runs.require_same(tmp_path, then, {"seed": 0, "tied": True})
    with pytest.raises(RunError) as error:
        runs.require_same(tmp_path, then, {"seed": 1, "batch_size": 64, "tied": True})
    assert str(error.value).splitlines() == [
        f"{tmp_path}: the run in it has other options:",
        "  --seed: then 0, now 1",
        "  --batch-size: then 32, now 64",
    ]


def is_full(error):
    return error.value.errno == errno.ENOSPC


def test_a_checkpoint_asks_for_room_before_it_is_written(tmp_path, monkeypatch, capfd):
    """Orbax would print a traceback for each of its threads."""
    record(tmp_path, [1])
    arrays = 5 << 20
    large = {"w": jnp.zeros(arrays // 4)}
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((arrays, False), (arrays + (2 << 20), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with runs.RunFolder(tmp_path, HEADER) as folder:
            assert folder.epochs_done == 1
            if fits:
                folder.record_epoch({"loss": 0.5}, large)
            else:
                with pytest.raises(OSError, match="No space left on device") as error:
                    folder.record_epoch({"loss": 0.5}, large)
                assert is_full(error)
                assert error.value.filename == str(tmp_path / "checkpoints")
    assert [row.get("epoch") for row in metrics_rows(tmp_path)] == [None, 1, 2]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("raised", "wanted", "message"),
    [
        (ValueError("Error writing: [os_error_code='28']\nand more"), OSError, "No space left"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), OSError, "quota"),
        (
            RuntimeError("no such thing\nand more"),
            RunError,
            r"2: cannot be written \(no such thing\)",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_error(
    tmp_path, monkeypatch, caplog, raised, wanted, message
):
    def save(*_, **__):
        logging.getLogger("absl").error("a traceback of a thread")
        raise raised

    record(tmp_path, [1])
    with runs.RunFolder(tmp_path, HEADER) as folder:
        monkeypatch.setattr(folder._checkpoints, "save", save)
        with pytest.raises(wanted, match=message):
            folder.record_epoch({"loss": 0.5}, state(2))
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]
    logging.getLogger("absl").error("is heard again")
    assert "is heard again" in caplog.text
    record(tmp_path, [2])
    assert [row.get("epoch") for row in metrics_rows(tmp_path)] == [None, 1, 2]


def test_a_file_that_cannot_be_replaced_stays_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "figures"
    files.write_whole(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.write_whole(path, "new")
    assert is_full(error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="holds no run to resume"):
        runs.read_config(tmp_path)
    with pytest.raises(RunError, match="not a folder"):
        runs.read_config(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="not a folder"):
        runs.require_fresh(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        runs.create(tmp_path / "thesis.tex" / "run", {})


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"config\.json: damaged"):
        runs.read_config(tmp_path)


@pytest.fixture
def heard_interrupts():
    """A program that a shell runs in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_a_checkpoint(heard_interrupts):
    """A second one does not."""
    steps = []

    def save(interrupts):
        with runs._uninterrupted():
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
            steps.append(interrupts)

    for interrupts in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save(interrupts)
    assert steps == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
