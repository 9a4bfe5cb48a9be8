"""The vocabulary-parallel loss: logits `[rows, classes]` whose classes are spread over devices.

Where there are several devices they serve. A CPU is split into simulated ones, in a process of its
own, as JAX wants to know about them before it starts; that tells of correctness and overhead, not
of speed, since they share the same cores.

    python -m experiments.benchmarking.sharded SECONDS ROWS CLASSES HEAP PEER...

HEAP is how many bytes malloc is to get and to keep; 0 leaves it as it is.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ce_jax
from experiments.benchmarking import jax_peers
from experiments.benchmarking.allocator import keep_freed_memory
from experiments.benchmarking.measure import BASELINE, OURS, Row, compare, present
from experiments.benchmarking.problems import Problem
from experiments.benchmarking.programs import Loss, Peer, Program, of_functions
from experiments.benchmarking.timing import Effort, Samples

SIMULATED_DEVICES = 8
PEERS = (OURS, BASELINE, "jax.nn")

_ROOT = Path(__file__).parents[2]
_OPERATION = "vocab-parallel"
_AXIS = "classes"


def rows(effort: Effort, peers: Sequence[Peer], *, quick: bool, kept: bool) -> list[Row]:
    """The rows for 1, 2, 4, ... of the devices there are, or of simulated ones on a CPU.

    Args:
      effort: how long to measure.
      peers: of whom some take part, unless they are missing.
      quick: whether a small shape does.
      kept: whether malloc is to keep freed memory, in the process of its own.
    """
    shape = (256, 4096) if quick else (1024, 32768)
    problem = Problem(_OPERATION, *shape)
    found, names = present(problem, peers, PEERS)
    if jax.device_count() > 1:
        return found + measure(effort, names, *shape)
    if jax.default_backend() != "cpu":
        return found + [Row(problem, name, "needs several devices") for name in names]
    flags = os.environ.get("XLA_FLAGS", "")
    simulate = f"--xla_force_host_platform_device_count={SIMULATED_DEVICES}"
    heap = 16 * shape[0] * shape[1] if kept else 0
    command = [sys.executable, "-m", __name__, *map(str, (effort.seconds, *shape, heap)), *names]
    output = subprocess.run(
        command,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {simulate}"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return found + [_row(values) for values in json.loads(output)]


def measure(effort: Effort, names: Sequence[str], rows: int, classes: int) -> list[Row]:
    """The rows for 1, 2, 4, ... of the devices of this process."""
    problem = Problem(_OPERATION, rows, classes)
    inputs = Problem("integer", rows, classes).inputs()
    found = []
    devices = 1
    while devices <= jax.device_count():
        programs = _programs(names, inputs["logits"], inputs["labels"], jax.devices()[:devices])
        for program in programs.values():
            program.gradient()
            if program.forward is not None:
                program.forward()
        found += compare(problem, programs, effort, devices=devices)
        devices *= 2
    return found


def _programs(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, devices: Sequence[jax.Device]
) -> dict[str, Program]:
    mesh = jax.make_mesh((len(devices),), (_AXIS,), (AxisType.Auto,), devices=devices)
    z = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, _AXIS)))
    y = jax.device_put(labels, NamedSharding(mesh, PartitionSpec()))
    losses = jax_peers.losses()
    functions = {name: losses[name]["integer"] for name in names} | {OURS: _ours(mesh)}
    return {
        name: of_functions(function, jax.value_and_grad(function), (z, y))
        for name, function in functions.items()
    }


def _ours(mesh: Mesh) -> Loss:
    return jax.shard_map(
        partial(
            ce_jax.softmax_cross_entropy_with_integer_labels, axis_name=_AXIS, reduction="mean"
        ),
        mesh=mesh,
        in_specs=(PartitionSpec(None, _AXIS), PartitionSpec()),
        out_specs=PartitionSpec(),
    )


def _row(values: list[Any]) -> Row:
    row = Row(*values)
    names = ("forward", "gradient", "to_optax", "to_limit")
    lists = {name: getattr(row, name) for name in names}
    figures: dict[str, Any] = {
        name: None if x is None else Samples(tuple(x[0])) for name, x in lists.items()
    }
    return row._replace(problem=Problem(*values[0]), **figures)


if __name__ == "__main__":
    seconds, (n, v, size) = float(sys.argv[1]), map(int, sys.argv[2:5])
    if size:
        keep_freed_memory(size)
    print(json.dumps(measure(Effort(seconds), sys.argv[5:], n, v)))
