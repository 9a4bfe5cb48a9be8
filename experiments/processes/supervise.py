"""Processes that belong together: what they print is forwarded, and one failure ends them all."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self, TypeAlias

Joining: TypeAlias = Mapping[str, Any]

_PROGRAM = (sys.executable, "-u", "-m", "experiments.processes.worker")
_POLL_SECONDS = 0.05
# Where processes exchange data, the others die of the first one's death. It says more to tell so
# than to kill them before.
_AFTERMATH_SECONDS = 0.5


class Failure(NamedTuple):
    """What ended a job.

    Attributes:
      status: the exit status of the process that failed first, or the negative number of the signal
        that killed it.
      joined: whether it had met the others.
      fates: what became of each process, beginning with that one.
    """

    status: int
    joined: bool
    fates: list[str]


class Worker:
    """A process of the job, and two threads that forward what it prints. Use it with `with`.

    Args:
      name: what messages call it.
      prefix: what its lines begin with.
      joining: keyword arguments of `jax.distributed.initialize`.
      command: the experiment and its arguments.
      environment: variables besides those of this process.
      unwritten: gets the error where its lines cannot be passed on.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        joining: Joining,
        command: Sequence[str],
        environment: Mapping[str, str],
        unwritten: list[OSError],
    ):
        self.name = name
        # Closes with this process, however that ends, and so tells the worker to end too.
        self._line, its_end = socket.socketpair()
        self._line.setblocking(False)
        with its_end:
            self._process = subprocess.Popen(
                [*_PROGRAM, json.dumps(joining), *command],
                env={**os.environ, **environment},
                stdin=its_end.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # Out of reach of the terminal's Ctrl-C, which is for this process alone.
                start_new_session=True,
            )
        streams = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._threads = [
            threading.Thread(target=_forward, args=(source, target, prefix, unwritten), daemon=True)
            for source, target in streams
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def kill(self) -> None:
        """Ends it, without waiting for that."""
        self._process.kill()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        self._line.close()

    @property
    def status(self) -> int | None:
        """Its exit status, or the negative number of the signal that killed it, or None."""
        return self._process.poll()

    @property
    def joined(self) -> bool:
        """Whether it has met the other processes."""
        try:
            return bool(self._line.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, ConnectionResetError):
            return False

    @property
    def fate(self) -> str:
        """What became of it, in words."""
        if self.status is None:
            return f"{self.name} was ended"
        if self.status < 0:
            return f"{self.name} was killed by {signal.Signals(-self.status).name}"
        return f"{self.name} ended with status {self.status}"


def run(
    jobs: Mapping[str, Joining],
    command: Sequence[str],
    environment: Mapping[str, str],
    until: Callable[[], bool],
) -> Failure | None:
    """Runs a process for each job until all are done or one fails, and then ends the others.

    Args:
      jobs: how each is to join the others, by its name.
      command: the experiment and its arguments.
      environment: variables besides those of this process.
      until: says, asked many times a second, whether to end all of them now.

    Returns:
      The failure, or None where all were done or had to be ended.

    Raises:
      OSError: what they print cannot be passed on, since a disk is full. They were ended.
    """
    unwritten: list[OSError] = []
    with contextlib.ExitStack() as stack:
        workers = []
        for index, (name, joining) in enumerate(jobs.items()):
            prefix = f"[{index}] " if len(jobs) > 1 else ""
            worker = Worker(name, prefix, joining, command, environment, unwritten)
            workers.append(stack.enter_context(worker))
        # All at once in the end, or the last ones would complain about the death of the first.
        for worker in workers:
            stack.callback(worker.kill)
        while not (failed := [worker for worker in workers if worker.status]):
            if unwritten:
                raise unwritten[0]
            if until() or all(worker.status == 0 for worker in workers):
                return None
            time.sleep(_POLL_SECONDS)
        first = min(failed, key=_likely_victim)
        time.sleep(_AFTERMATH_SECONDS)
        others = sorted((worker for worker in workers if worker is not first), key=_likely_victim)
        return Failure(first.status or 0, first.joined, [w.fate for w in (first, *others)])


def _likely_victim(worker: Worker) -> int:
    """Ranks those that died of themselves before those that may have died of that.

    JAX aborts a process that misses another one; an exchange of data that fails is an exception.
    """
    if worker.status is None:
        return 3
    if worker.status == -signal.SIGABRT:
        return 2
    return 0 if worker.status < 0 else 1


def _forward(source: IO[str], target: IO[str], prefix: str, unwritten: list[OSError]) -> None:
    with source:
        for line in source:
            try:
                target.write(prefix + line)
                target.flush()
            except OSError as error:
                unwritten.append(error)
                return
