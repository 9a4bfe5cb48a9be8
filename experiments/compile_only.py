"""Compiles the losses for accelerators that need not be there, and tells the memory they take.

    python -m experiments.compile_only

XLA compiles for an NVIDIA H200 and a TPU v6e on any machine that has its plugins:
`jax-cuda13-plugin` and `jax-cuda13-pjrt` (with `--no-deps`, of jax's own version, and `ptxas` from
a CUDA toolkit), and `jax[tpu]`. Expect two minutes. Temporaries are what the program holds at once
beside its inputs and results; reads and writes are those of arrays of the size of the logits.
"""

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.benchmarking import jax_peers
from experiments.benchmarking.problems import ARGUMENTS, Problem
from experiments.errors import ExperimentError

ROWS, FEATURES, CLASSES = 8192, 2304, 256000
DENSE = ("integer", "ignored", "smoothed", "weighted", "one-hot", "sigmoid")

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H200"
"""

# Or the TPU's library would ask a cloud which machine it is on.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(StrEnum):
    """What to compile for."""

    H200 = "h200"
    TPU = "v6e"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: Annotated[
        list[Target] | None,
        typer.Option(
            help="Accelerator to compile for. May be given several times.", show_default="both"
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of tokens.")] = ROWS,
    features: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = FEATURES,
    classes: Annotated[int, typer.Option(min=2, help="Size of the vocabulary.")] = CLASSES,
) -> None:
    """Compile the losses for accelerators and show their temporaries, in bfloat16.

    Exit status: 0 if all that was asked for could be compiled, 1 if a plugin is missing.
    """
    console = Console()
    # This process itself needs no accelerator, and kernels cannot be chosen by trying them.
    jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    for name, value in _NO_TPU_HOST.items():
        os.environ.setdefault(name, value)
    failed = False
    for chosen in target or list(Target):
        try:
            sharding = sharding_of(chosen)
        except ExperimentError as error:
            Console(stderr=True, soft_wrap=True).print(f"{chosen}: {error}", markup=False)
            failed = True
            continue
        console.print(f"\n{chosen}, jax {jax.__version__}, bfloat16, value and gradient\n")
        console.print("| loss | shape | peer | temporaries | reads | writes |", markup=False)
        console.print("| --- | --- | --- | ---: | ---: | ---: |", markup=False)
        for problem, peer, loss in programs(rows, features, classes):
            figures = compiled(problem, loss, sharding)
            console.print(
                f"| {problem.operation} | {problem.shape} | {peer} | {figures} |",
                markup=False,
                soft_wrap=True,
            )
    if failed:
        raise typer.Exit(1)


def sharding_of(target: Target) -> NamedSharding:
    """A placement of whole arrays on the first device of a machine that is described only.

    Raises:
      ExperimentError: a plugin is missing.
    """
    if target is Target.H200:
        _require("jax_cuda13_plugin", "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt")
        if shutil.which("ptxas") is None:
            raise ExperimentError("ptxas is not on the PATH: it comes with the CUDA toolkit")
        options: dict[str, Any] = {"topology": "1x1x1", "target_config": _H200}
        topology = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
    else:
        _require("libtpu", "pip install jax[tpu]")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    mesh = Mesh(topology.devices[:1], ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def programs(
    rows: int, features: int, classes: int
) -> list[tuple[Problem, str, Callable[..., Any]]]:
    """What is compiled: the linear form in both strategies and dense, and the dense losses."""
    losses = jax_peers.losses()
    linear = Problem("linear", rows, classes, "bfloat16", features)
    # Said here, since the defaults would be those of this process's CPU: what an accelerator gets,
    # and room for the logits of 1024 tokens in float32, bfloat16 and a copy.
    accelerator = min(max(features * classes * 2 // 3, 256 * 10**6), 10**9)
    tokens = 1024 * classes * 10

    def dense(h: jax.Array, k: jax.Array, y: jax.Array) -> jax.Array:
        return losses["ce_jax"]["integer"](h @ k, y)

    found: list[tuple[Problem, str, Callable[..., Any]]] = [
        (
            linear,
            f"ce_jax, budget {budget / 1e6:.0f} MB",
            partial(losses["ce_jax"]["linear"], memory_budget=budget),
        )
        for budget in (accelerator, tokens)
    ]
    found += [
        (linear, "ce_jax, dense", dense),
        (linear, "optax", losses["optax"]["linear"]),
    ]
    for operation in DENSE:
        problem = Problem(operation, rows, classes, "bfloat16")
        found += [(problem, name, losses[name][operation]) for name in ("ce_jax", "optax")]
    return found


def compiled(problem: Problem, loss: Callable[..., Any], sharding: NamedSharding) -> str:
    """Compiles value and gradient of a loss and returns the cells of the table."""
    names, differentiated = ARGUMENTS[problem.operation]
    n, d, v = problem.rows, problem.features, problem.classes
    shapes = {
        "logits": (n, v),
        "probs": (n, v),
        "targets": (n, v),
        "labels": (n,),
        "weight": (v,),
        "hidden": (n, d),
        "kernel": (d, v),
    }
    dtypes = {"labels": jnp.int32, "weight": jnp.float32}
    struct = partial(jax.ShapeDtypeStruct, sharding=sharding)
    args = [struct(shapes[name], dtypes.get(name, jnp.bfloat16)) for name in names]
    function = jax.jit(jax.value_and_grad(loss, tuple(range(differentiated))))
    # What the library asks when it is traced; this process itself runs on a CPU.
    backend = sharding.mesh.devices.flat[0].platform
    try:
        with mock.patch.object(jax, "default_backend", return_value=backend):
            program: Any = function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:  # a dense form may not fit
        return f"{str(error).splitlines()[0][:160]} | - | -"
    size = program.memory_analysis().temp_size_in_bytes
    reads, writes = passes(program.as_text(), n, v)
    return f"{size / 1e6:.2f} MB | {reads} | {writes}"


def passes(hlo: str, rows: int, classes: int) -> tuple[int, int]:
    """How often the entry of a program reads and writes as many numbers as `[rows, classes]` has.

    What the program is given for nothing (parameters, tuples, other views of the same bytes) does
    not count, nor what happens inside loops.
    """
    entry = hlo[hlo.index("\nENTRY") :].splitlines()[1:]

    def whole(types: str) -> int:
        shapes = re.findall(r"\[([\d,]+)\]", types)
        return sum(math.prod(map(int, shape.split(","))) == rows * classes for shape in shapes)

    types: dict[str, str] = {}
    reads = writes = 0
    for line in entry:
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
        if match is None:
            continue
        name, type_, operation, rest = match.groups()
        types[name] = type_
        if operation in ("parameter", "bitcast", "tuple", "get-tuple-element"):
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        reads += sum(whole(types.get(operand, "")) for operand in operands)
        writes += whole(type_)
    return reads, writes


def _require(module: str, command: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ExperimentError(f"no plugin {module}; for jax {jax.__version__}: {command}")


if __name__ == "__main__":
    app()
