"""Processes that belong together: what they print is forwarded, and one failure ends them all.

It is done here because the process pools of the standard library do not tell whose a printed line
is, nor which process failed first and how.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeAlias

Joining: TypeAlias = Mapping[str, Any]

# The line by which a worker says that it has met the others.
JOINED = "\0joined\n"

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
    """A process of the job, and two threads that forward what it prints.

    Args:
      name: what messages call it.
      prefix: what its lines begin with.
      arguments: of the worker's program.
      environment: variables besides those of this process.
      unwritten: gets the error where its lines cannot be passed on.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        unwritten: list[OSError],
    ):
        self.name = name
        self.joined = False
        self.process = subprocess.Popen(
            [*_PROGRAM, *arguments],
            env={**os.environ, **environment},
            # Closes with this process, however that ends, and so tells the worker to end too.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Out of reach of the terminal's Ctrl-C, which is for this process alone.
            start_new_session=True,
        )
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._threads = [
            threading.Thread(target=self._forward, args=(*pair, prefix, unwritten), daemon=True)
            for pair in streams
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Returns when it has ended and all it printed is passed on."""
        with self.process:
            for thread in self._threads:
                thread.join()

    @property
    def status(self) -> int | None:
        """Its exit status, or the negative number of the signal that killed it, or None."""
        return self.process.poll()

    @property
    def fate(self) -> str:
        """What became of it, in words."""
        if self.status is None:
            return f"{self.name} was ended"
        if self.status < 0:
            return f"{self.name} was killed by {signal.Signals(-self.status).name}"
        return f"{self.name} ended with status {self.status}"

    def _forward(
        self, source: IO[str], target: IO[str], prefix: str, unwritten: list[OSError]
    ) -> None:
        with source:
            for line in source:
                if line == JOINED:
                    self.joined = True
                    continue
                try:
                    target.write(prefix + line)
                    target.flush()
                except OSError as error:
                    unwritten.append(error)
                    return


def run(
    jobs: Mapping[str, Joining],
    command: Sequence[str],
    environment: Mapping[str, str],
    until: Callable[[], bool],
) -> Failure | None:
    """Runs a process for each job until all are done or one fails, and then ends the others.

    Args:
      jobs: by name, what each gives to `jax.distributed.initialize` to join the others.
      command: the experiment and its arguments.
      environment: variables besides those of this process.
      until: says, asked many times a second, whether to end all of them now.

    Returns:
      The failure, or None where all were done or had to be ended.

    Raises:
      OSError: what they print cannot be passed on, since a disk is full. They were ended.
    """
    unwritten: list[OSError] = []
    workers: list[Worker] = []
    try:
        for index, (name, joining) in enumerate(jobs.items()):
            prefix = f"[{index}] " if len(jobs) > 1 else ""
            arguments = [json.dumps(joining), *command]
            workers.append(Worker(name, prefix, arguments, environment, unwritten))
        while not any(worker.status for worker in workers):
            if unwritten:
                raise unwritten[0]
            if until() or all(worker.status == 0 for worker in workers):
                return None
            time.sleep(_POLL_SECONDS)
        first = min(workers, key=_likely_victim)
        time.sleep(_AFTERMATH_SECONDS)
        others = sorted((worker for worker in workers if worker is not first), key=_likely_victim)
        return Failure(first.status or 0, first.joined, [w.fate for w in (first, *others)])
    finally:
        # All at once, or the last ones would complain about the death of the first.
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.wait()


def _likely_victim(worker: Worker) -> int:
    """Ranks those that died of themselves before those that may have died of that.

    JAX aborts a process that misses another one; an exchange of data that fails is an exception.
    """
    if not worker.status:
        return 3
    if worker.status == -signal.SIGABRT:
        return 2
    return 0 if worker.status < 0 else 1
