"""What a user waits for before the first step: import and compilation."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarking import jax_peers
from experiments.benchmarking.measure import BASELINE, OURS, Row
from experiments.benchmarking.problems import ARGUMENTS, LINEAR, Problem
from experiments.benchmarking.timing import Samples

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


def import_rows(rounds: int) -> list[Row]:
    """The time of importing a library where `jax` is imported already, each in a new process.

    A checkout is compiled to bytecode by its first import, which is not timed; an installed package
    was compiled by pip.
    """
    names = (OURS, BASELINE)
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
    return _rows(Problem("import", 0, 0), samples)


def compile_rows(operations: list[str], rounds: int) -> list[Row]:
    """The time from a Python function to the compiled program of its value and gradient."""
    rows = []
    losses = {name: jax_peers.losses()[name] for name in (OURS, BASELINE)}
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
        samples: dict[str, list[float]] = {name: [] for name in losses}
        # The first round also pays for what every compilation of the process shares.
        for round_ in range(rounds + 1):
            for name, functions in losses.items():
                function = jax.value_and_grad(
                    functions[operation],
                    tuple(range(differentiated)),
                    has_aux=operation == "statistics",
                )
                jax.clear_caches()
                start = time.perf_counter()
                jax.jit(function).lower(*shapes).compile()
                if round_:
                    samples[name].append(time.perf_counter() - start)
        rows += _rows(problem._replace(operation=f"compile {operation}"), samples)
    return rows


def _rows(problem: Problem, samples: dict[str, list[float]]) -> list[Row]:
    seconds = {name: Samples(tuple(values)) for name, values in samples.items()}
    baseline = seconds[BASELINE]
    return [
        Row(problem, name, device="CPU", gradient=times, to_optax=times.over(baseline))
        for name, times in seconds.items()
    ]
