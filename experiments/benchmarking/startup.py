"""What a user waits for before the first step: import and compilation."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarking import jax_peers
from experiments.benchmarking.measure import BASELINE, OURS, Row, present, ratio
from experiments.benchmarking.problems import ARGUMENTS, LINEAR, Problem
from experiments.benchmarking.programs import Peer
from experiments.benchmarking.timing import Samples

PEERS = (OURS, BASELINE)

_ROOT = Path(__file__).parents[2]
_IMPORT = """
import time
import jax
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
"""
_COMPILED_SHAPES = ((1024, 1000), (65536, 10))
_FEATURES = 64  # of the linear form, which is for many classes: the first shape


def import_rows(peers: Sequence[Peer], rounds: int) -> list[Row]:
    """The time of importing a library where `jax` is imported already, each in a new process.

    A checkout is compiled to bytecode by its first import, which is not timed; an installed package
    was compiled by pip.
    """
    problem = Problem("import", 0, 0)
    found, names = present(problem, peers, PEERS)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names:
            command = [sys.executable, "-c", _IMPORT.format(name)]
            output = subprocess.run(
                command, cwd=_ROOT, env=environment, check=True, capture_output=True, text=True
            ).stdout
            if round_:
                samples[name].append(float(output))
    return found + _rows(problem, samples)


def compile_rows(peers: Sequence[Peer], operations: Sequence[str], rounds: int) -> list[Row]:
    """The time from a Python function to the compiled program of its value and gradient."""
    rows = []
    losses = jax_peers.losses()
    for operation, (n, classes) in itertools.product(operations, _COMPILED_SHAPES):
        features = _FEATURES if operation in LINEAR else 0
        if features and (n, classes) != _COMPILED_SHAPES[0]:
            continue
        problem = Problem(operation, n, classes, "float32", features)
        shapes = [
            jax.ShapeDtypeStruct(array.shape, jnp.int32 if array.dtype == "int32" else jnp.float32)
            for array in problem.inputs().values()
        ]
        _, differentiated = ARGUMENTS[operation]
        compiled = problem._replace(operation=f"compile {operation}")
        missing, names = present(compiled, peers, PEERS)
        samples: dict[str, list[float]] = {name: [] for name in names}
        # The first round also pays for what every compilation of the process shares.
        for round_ in range(rounds + 1):
            for name in names:
                function = jax.value_and_grad(
                    losses[name][operation],
                    tuple(range(differentiated)),
                    has_aux=operation == "statistics",
                )
                jax.clear_caches()
                start = time.perf_counter()
                jax.jit(function).lower(*shapes).compile()
                if round_:
                    samples[name].append(time.perf_counter() - start)
        rows += missing + _rows(compiled, samples)
    return rows


def _rows(problem: Problem, samples: dict[str, list[float]]) -> list[Row]:
    seconds = {name: Samples(tuple(values)) for name, values in samples.items()}
    baseline = seconds.get(BASELINE)
    return [
        Row(problem, name, device="CPU", gradient=times, to_optax=ratio(times, baseline))
        for name, times in seconds.items()
    ]
