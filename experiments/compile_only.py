"""Compiles the losses for accelerators that need not be there, and tells the memory they take.

    python -m experiments.compile_only

XLA compiles for an NVIDIA H200 and a TPU v6e on any machine that has its plugins:
`jax-cuda13-plugin` and `jax-cuda13-pjrt` (with `--no-deps`, of jax's own version, and `ptxas` from
a CUDA toolkit), and `jax[tpu]`. Expect two minutes. Temporaries are what the program holds at once
beside its inputs and results; reads and writes are those of arrays of the size of the logits;
matmuls are of the size of hidden states times kernel.

    python -m experiments.compile_only --target here

does the same for the accelerator of this machine, and also times each program, on random numbers.
"""

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax.losses
import typer
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import ce_jax
from experiments.benchmarking import jax_peers
from experiments.benchmarking.problems import ARGUMENTS, Problem
from experiments.benchmarking.timing import Effort, interleave
from experiments.output.errors import ExperimentError

ROWS, FEATURES, CLASSES = 8192, 2304, 256000
DENSE = ("integer", "ignored", "smoothed", "weighted", "one-hot", "sigmoid", "statistics")
# Losses that the benchmark does not time, by the arrays of which they are functions.
OTHERS = {
    "poly_loss_cross_entropy": ("logits", "probs"),
    "sigmoid_focal_loss": ("logits", "targets"),
    "distillation_loss": ("logits", "targets"),
    "jensen_shannon_loss": ("logits", "targets"),
    "top_k_distillation_loss": ("logits", "kept_ids", "kept_log_probs"),
    "brier_score": ("logits", "labels"),
    "nll_loss": ("logits", "labels"),
    "binary_cross_entropy": ("probs", "targets"),
}
# Classes per row that are kept of a teacher.
_KEPT = 64
# Bytes of a block of logits, where little memory is to be taken.
_SMALL = 256 * 10**6

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
    HERE = "here"


_DESCRIBED = [Target.H200, Target.TPU]  # these machines need not be there


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: Annotated[
        list[Target] | None,
        typer.Option(
            help="What to compile for; `here` is this machine's. May be given several times.",
            show_default="h200 and v6e",
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
    targets = target or _DESCRIBED
    if Target.HERE not in targets:
        # This process itself needs no accelerator, and kernels cannot be chosen by trying them.
        jax.config.update("jax_platforms", "cpu")
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    for name, value in _NO_TPU_HOST.items():
        os.environ.setdefault(name, value)
    failed = False
    for chosen in targets:
        try:
            sharding = sharding_of(chosen)
        except ExperimentError as error:
            Console(stderr=True, soft_wrap=True).print(f"{chosen}: {error}", markup=False)
            failed = True
            continue
        here = chosen is Target.HERE
        name = jax.devices()[0].device_kind if here else chosen
        console.print(f"\n{name}, jax {jax.__version__}, bfloat16, value and gradient\n")
        columns = ["temporaries", "reads", "writes", "matmuls", *(["time"] if here else [])]
        console.print(f"| loss | shape | peer | {' | '.join(columns)} |", markup=False)
        console.print(f"| --- | --- | --- |{' ---: |' * len(columns)}", markup=False)
        for program in programs(rows, features, classes):
            figures = compiled(program, sharding, here=here)
            console.print(
                f"| {program.name} | {program.problem.shape} | {program.peer} | {figures} |",
                markup=False,
                soft_wrap=True,
            )
    if failed:
        raise typer.Exit(1)


def sharding_of(target: Target) -> NamedSharding:
    """A placement of whole arrays on the first device, of a machine that is described only or here.

    Raises:
      ExperimentError: a plugin is missing.
    """
    if target is Target.HERE:
        devices = jax.devices()
    elif target is Target.H200:
        _require("jax_cuda13_plugin", "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt")
        if shutil.which("ptxas") is None:
            raise ExperimentError("ptxas is not on the PATH: it comes with the CUDA toolkit")
        options: dict[str, Any] = {"topology": "1x1x1", "target_config": _H200}
        devices = topologies.get_topology_desc("", "cuda", **options).devices
    else:
        _require("libtpu", "pip install jax[tpu]")
        devices = topologies.get_topology_desc("v6e:2x2", "tpu").devices
    mesh = Mesh(devices[:1], ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


class Program(NamedTuple):
    """What is compiled: a loss, and the dtype of its kernel, if it has one."""

    problem: Problem
    peer: str
    loss: Callable[..., Any]
    kernel_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """The operation, and what its kernel is if not as narrow as the rest."""
        mixed = self.kernel_dtype != self.problem.dtype and self.problem.features
        return self.problem.operation + (f", {self.kernel_dtype} kernel" if mixed else "")


def programs(rows: int, features: int, classes: int) -> list[Program]:
    """The linear form with three budgets and dense, also in mixed precision; the dense losses."""
    losses = jax_peers.losses()
    linear = Problem("linear", rows, classes, "bfloat16", features)
    # Room for the logits of 1024 tokens in float32, bfloat16 and a copy.
    tokens = 1024 * classes * 10

    def ours(budget: int | None) -> tuple[str, Callable[..., Any]]:
        name = "default budget" if budget is None else f"budget {budget / 1e6:.0f} MB"
        return f"ce_jax, {name}", partial(losses["ce_jax"]["linear"], memory_budget=budget)

    def dense(h: jax.Array, k: jax.Array, y: jax.Array) -> jax.Array:
        return losses["ce_jax"]["integer"](h @ k.astype(h.dtype), y)

    def optax_dense(h: jax.Array, k: jax.Array, y: jax.Array) -> jax.Array:
        return losses["optax"]["linear"](h, k.astype(h.dtype), y)

    found = [
        Program(linear, name, loss, kernel_dtype)
        for kernel_dtype in ("bfloat16", "float32")
        for name, loss in (
            *map(ours, (_SMALL, None, tokens)),
            ("ce_jax, dense", dense),
            ("optax", optax_dense),
        )
    ]
    for operation in DENSE:
        problem = Problem(operation, rows, classes, "bfloat16")
        found += [Program(problem, name, losses[name][operation]) for name in ("ce_jax", "optax")]
    for name in OTHERS:
        problem = Problem(name, rows, classes, "bfloat16")
        found.append(Program(problem, "ce_jax", partial(getattr(ce_jax, name), reduction="mean")))
        if hasattr(optax.losses, name):
            found.append(Program(problem, "optax", _mean_of(getattr(optax.losses, name))))
    return found


def _mean_of(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *arrays: jnp.mean(loss(*arrays))


def compiled(program: Program, sharding: NamedSharding, *, here: bool = False) -> str:
    """Compiles value and gradient of a loss and returns the cells of the table.

    Args:
      program: the loss.
      sharding: where its arrays are.
      here: whether that device is there, and the program is to be timed.
    """
    problem = program.problem
    others = OTHERS.get(problem.operation)
    names, differentiated = (others, 1) if others else ARGUMENTS[problem.operation]
    n, d, v = problem.rows, problem.features, problem.classes
    shapes = {
        "logits": (n, v),
        "probs": (n, v),
        "targets": (n, v),
        "labels": (n,),
        "kept_ids": (n, _KEPT),
        "kept_log_probs": (n, _KEPT),
        "weight": (v,),
        "hidden": (n, d),
        "kernel": (d, v),
    }
    dtypes = {"labels": "int32", "weight": "float32", "kernel": program.kernel_dtype}
    dtypes |= {"kept_ids": "int32", "kept_log_probs": "float32"}
    struct = partial(jax.ShapeDtypeStruct, sharding=sharding)
    args = [struct(shapes[name], dtypes.get(name, "bfloat16")) for name in names]
    has_aux = problem.operation == "statistics"
    step = jax.value_and_grad(program.loss, tuple(range(differentiated)), has_aux=has_aux)
    # What the library asks when it is traced; this process itself runs on a CPU.
    backend = sharding.mesh.devices.flat[0].platform
    try:
        with mock.patch.object(jax, "default_backend", return_value=backend):
            traced = jax.jit(step).trace(*args)
            found: Any = traced.lower().compile()
        time = f" | {_milliseconds(found, args, v):.2f} ms" if here else ""
    except jax.errors.JaxRuntimeError as error:  # a dense form may not fit
        return f"{str(error).splitlines()[0][:160]} | - | - | -{' | -' if here else ''}"
    size = found.memory_analysis().temp_size_in_bytes
    reads, writes = passes(found.as_text(), n, v)
    matmuls = f"{products(traced.jaxpr.jaxpr) / (n * d * v):.1f}" if d else "-"
    return f"{size / 1e6:.2f} MB | {reads} | {writes} | {matmuls}{time}"


def _milliseconds(program: Any, args: Sequence[jax.ShapeDtypeStruct], classes: int) -> float:
    """The median time of a call, on uniform numbers and ids of a row that differ."""
    arrays = [
        jax.lax.broadcasted_iota(x.dtype, x.shape, len(x.shape) - 1) % classes
        if jnp.issubdtype(x.dtype, jnp.integer)
        else jax.random.uniform(jax.random.key(i), x.shape, x.dtype)
        for i, x in enumerate(args)
    ]
    arrays = jax.device_put(arrays, [x.sharding for x in args])
    call = {"call": lambda: jax.block_until_ready(program(*arrays))}
    call["call"]()
    return 1e3 * interleave(call, Effort(0.1))["call"].median


def products(jaxpr: Any) -> int:
    """How many products of two numbers all matmuls of a program take, those in loops each time."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            total += summed * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr"))
        bodies = (getattr(x, "jaxpr", x) for x in inner)  # of closed ones
        total += times * sum(products(x) for x in bodies if hasattr(x, "eqns"))
    return total


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
