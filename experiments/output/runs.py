"""The folder of a run: its configuration, metrics, TensorBoard events and checkpoints.

What makes a run resumable at any moment is the order of writing. The configuration comes first. At
the end of an epoch its metrics are on the disk before its checkpoint begins, and a checkpoint takes
its name only when it is complete. So after a kill the newest complete checkpoint has all the
metrics up to it; what lies beyond is cut off and computed again.

Where several processes share a run, all of them open its folder, which has to be one for all: a
checkpoint is written by all, everything else by the first.
"""

import contextlib
import errno
import gc
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp

from experiments.output import files
from experiments.output.errors import RunError
from experiments.output.events import EventFile
from experiments.processes import group

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
EVENTS_FOLDER = "events"

_KEPT_CHECKPOINTS = 2
# What Orbax calls a checkpoint before it is complete, and the bytes it writes beside the arrays.
_UNFINISHED = "*.orbax-checkpoint-tmp"
_BESIDE_ARRAYS = 1 << 20

State = TypeVar("State")


class RunFolder:
    """One run on disk. Use `create` before a new one, and `close` at the end (or use `with`).

    Attributes:
      path: the folder.
      epochs_done: number of epochs in the newest checkpoint.
      history: the metrics of those epochs, and of the ones recorded since.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path.absolute()
        self.history: list[dict[str, Any]] = []
        self._header = dict(header)
        if group.is_first():
            # Orbax would do that in a thread that does not end with the program.
            for unfinished in (self.path / CHECKPOINT_FOLDER).glob(_UNFINISHED):
                shutil.rmtree(unfinished)
        self._checkpoints = ocp.CheckpointManager(
            self.path / CHECKPOINT_FOLDER,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT_CHECKPOINTS,
                # The next epoch takes over the buffers that are being saved.
                enable_async_checkpointing=False,
            ),
        )
        self.epochs_done = self._checkpoints.latest_step() or 0
        self._events: EventFile | None = None
        try:
            self.history = self._read_history()
            # The first process writes anew what the others read.
            group.wait_for_all("the metrics are read")
            if group.is_first():
                self._rewrite_metrics()
                self._events = self._replay_events()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record_epoch(self, metrics: Mapping[str, Any], state: Any) -> None:
        """Puts the metrics of the next epoch and then the state after it on the disk."""
        epoch = self.epochs_done + 1
        row = {"kind": "epoch", "epoch": epoch, **metrics}
        self.history.append(row)
        self._append(row)
        if self._events:
            self._events.add(epoch, row)
        self._save(epoch, state)
        self.epochs_done = epoch

    def record_final(self, metrics: Mapping[str, Any]) -> None:
        """Ends the metrics with the figures of the finished run."""
        self._append({"kind": "final", **metrics})

    def restore(self, like: State) -> State:
        """Returns the state in the newest checkpoint, placed on the devices as `like` is."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._checkpoints.restore(
                self.epochs_done, args=ocp.args.StandardRestore(abstract)
            )
        except (ValueError, KeyError, OSError) as error:
            folder = self.path / CHECKPOINT_FOLDER / str(self.epochs_done)
            raise RunError(
                f"{folder}: cannot be restored ({_first_line(error)}); remove it to go on from the "
                "checkpoint before it"
            ) from error

    def close(self) -> None:
        """Ends all writing."""
        self._checkpoints.close()

    def _save(self, epoch: int, state: Any) -> None:
        if group.is_first():
            _require_room(self.path / CHECKPOINT_FOLDER, state)
        failure: OSError | RunError | None = None
        with _silence(), _uninterrupted():
            try:
                self._checkpoints.save(epoch, args=ocp.args.StandardSave(state))
            except (ValueError, RuntimeError, OSError) as error:
                folder = self.path / CHECKPOINT_FOLDER / str(epoch)
                failure = _failure_to_write(folder, error)
            if failure is not None:
                # What Orbax's threads left behind would be reported when Python comes across it.
                gc.collect()
        if failure is not None:
            raise failure

    def _read_history(self) -> list[dict[str, Any]]:
        path = self.path / METRICS_FILE
        rows = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # The line that was being written at the end.
                if row["kind"] == "epoch" and row["epoch"] <= self.epochs_done:
                    rows.append(row)
        if [row["epoch"] for row in rows] != list(range(1, self.epochs_done + 1)):
            raise RunError(
                f"{path}: damaged, it lacks some of the {self.epochs_done} epochs that have a "
                "checkpoint"
            )
        return rows

    def _rewrite_metrics(self) -> None:
        rows = [{"kind": "run", **self._header}, *self.history]
        files.write_whole(self.path / METRICS_FILE, "".join(_json_line(row) for row in rows))

    def _append(self, row: Mapping[str, Any]) -> None:
        if not group.is_first():
            return
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(_json_line(row))
            file.flush()
            os.fsync(file.fileno())

    def _replay_events(self) -> EventFile:
        folder = self.path / EVENTS_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        events = EventFile(folder)
        for row in self.history:
            events.add(row["epoch"], row)
        return events


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets a first interrupt wait for the end of the block.

    Orbax's threads would go on beside a program that ends, and print what stops them.
    """
    interrupts: list[int] = []

    def later(number: int, frame: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def require_fresh(path: Path) -> None:
    """Raises RunError unless a new run could begin in this folder: it is missing or empty."""
    files.require_fresh(path, resumable=CONFIG_FILE)


def create(path: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder of a new run and writes its configuration.

    Raises:
      RunError: something is there already, or the folder cannot be made.
    """
    require_fresh(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        files.write_whole(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Returns the configuration of the run in a folder.

    Raises:
      RunError: there is no run in the folder, or its configuration cannot be read.
    """
    file = path / CONFIG_FILE
    try:
        if not path.exists():
            raise RunError(
                f"{path}: no such folder, so there is no run to resume; leave --resume out to "
                "start one there"
            )
        if not path.is_dir():
            raise RunError(f"{path}: not a folder")
        if not file.exists():
            cure = "; leave --resume out to start one there" if files.is_fresh(path) else ""
            raise RunError(f"{path}: holds no run to resume (no {CONFIG_FILE}){cure}")
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: damaged: {error}") from error
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file}: damaged: it is not a JSON object")
    return config


def require_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises RunError where a run is to be resumed with other options than it was begun with.

    Args:
      path: folder of the run.
      then: the options of the run.
      now: those that are asked for now, some or all of them.
    """
    changed = [name for name, value in now.items() if value != then.get(name)]
    if changed:
        lines = [
            f"\n  --{name.replace('_', '-')}: then {then.get(name)}, now {now[name]}"
            for name in changed
        ]
        raise RunError(f"{path}: the run in it has other options:{''.join(lines)}")


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require_room(folder: Path, state: Any) -> None:
    """Raises OSError where a disk has no room for a state.

    Orbax notices too, but then each of its threads prints a traceback, some of them at the end of
    the program.
    """
    wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _BESIDE_ARRAYS
    if shutil.disk_usage(folder).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps Orbax, which raises the error, from also printing it for each of its threads."""
    hook, disabled = sys.unraisablehook, logging.root.manager.disable
    sys.unraisablehook = lambda _: None
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logging.disable(disabled)


def _failure_to_write(folder: Path, error: BaseException) -> OSError | RunError:
    """The error of the system behind one of Orbax, where it tells of one."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])), str(folder))
    return RunError(f"{folder}: cannot be written ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
