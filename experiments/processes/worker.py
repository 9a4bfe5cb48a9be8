"""One of the processes of a run: joins the others, then runs an experiment.

`experiments.launch` starts it, with a pipe as its standard input. When that closes, the launcher is
gone, in whatever way, and the worker goes as well.
"""

import json
import os
import runpy
import sys
import threading
import traceback
from typing import NoReturn

import jax

from experiments.processes.supervise import JOINED


def main(joining: str, experiment: str, *arguments: str) -> None:
    """Runs an experiment as one of several processes.

    Args:
      joining: keyword arguments of `jax.distributed.initialize`, as JSON.
      experiment: name of a module of `experiments`.
      *arguments: its command line.
    """
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    try:
        jax.distributed.initialize(**json.loads(joining))
    except (ValueError, RuntimeError) as error:
        print(f"error: cannot join the other processes: {error}", file=sys.stderr)
        _end(1)
    try:
        # At once, so that no thread of XLA prints within the line.
        os.write(sys.stdout.fileno(), JOINED.encode())
        sys.argv[1:] = arguments
        runpy.run_module(f"experiments.{experiment}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        # What JAX does at an ordinary end is to wait for the others. That is for success only.
        if end.code:
            _end(end.code if isinstance(end.code, int) else 1)
    except Exception:
        traceback.print_exc()
        _end(1)


def _end_with_the_launcher() -> None:
    # Not by `sys.stdin`, whose lock Python wants at its end.
    os.read(sys.stdin.fileno(), 1)
    _end(1)


def _end(status: int) -> NoReturn:
    """Ends the process now: the connections to the others close, and they end as well."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
