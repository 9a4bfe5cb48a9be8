"""What a peer contributes to a problem, and the one that every JAX function does alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarking.problems import ARGUMENTS, IGNORED, Problem
from experiments.benchmarking.timing import Call

# A mean loss, or (for statistics) a pair of that and what is not differentiated.
Loss = Callable[..., Any]
# The arrays that a problem is about, by name.
Inputs = Mapping[str, jax.Array]


class Program(NamedTuple):
    """A peer's solution of a problem, ready to be called.

    Attributes:
      forward: computes the loss, and waits for it.
      gradient: computes the loss and its gradient, and waits for them.
      temporaries: tells the bytes that `gradient` holds at once beside its inputs and results;
        None where nobody can tell.
      device: what it runs on.
    """

    forward: Call | None
    gradient: Call
    temporaries: Callable[[], int | None]
    device: str


class Peer(NamedTuple):
    """A library, or one way of using it.

    Attributes:
      name: how the tables call it.
      operations: those it has a function for, or a few of its functions that make one.
      build: makes the program.
      missing: why it cannot take part; "" where it can.
    """

    name: str
    operations: frozenset[str]
    build: Callable[[Problem, Inputs], Program]
    missing: str = ""


def on_device(problem: Problem) -> Inputs:
    """The inputs on JAX's default device, in the dtypes of the problem."""
    arrays = problem.inputs()
    return {name: jnp.asarray(x).astype(problem.dtype_of(name)) for name, x in arrays.items()}


def jax_program(loss: Loss, problem: Problem, inputs: Inputs) -> Program:
    """The program of a JAX function, compiled unless the problem is about eager calls."""
    _, differentiated = ARGUMENTS[problem.formula]
    gradient_of = jax.value_and_grad(
        loss, tuple(range(differentiated)), has_aux=problem.formula == "statistics"
    )
    return of_functions(loss, gradient_of, list(inputs.values()), eager=problem.is_eager)


def of_functions(
    loss: Loss, gradient_of: Callable[..., Any], args: Sequence[jax.Array], *, eager: bool = False
) -> Program:
    """The program of a JAX function and its derivative, on given arrays."""
    if eager:
        forward, gradient = loss, gradient_of
    else:
        forward, gradient = jax.jit(loss), jax.jit(gradient_of)
    return Program(
        forward=lambda: jax.block_until_ready(forward(*args)),
        gradient=lambda: jax.block_until_ready(gradient(*args)),
        temporaries=lambda: None if eager else jax_temporaries(gradient, *args),
        device=kind_of_device(),
    )


def jax_temporaries(jitted: Any, *args: Any) -> int:
    """Bytes that a jitted function holds at once beside its arguments and results."""
    return int(jitted.lower(*args).compile().memory_analysis().temp_size_in_bytes)


def kind_of_device() -> str:
    """JAX's default device, in words."""
    device = jax.devices()[0]
    return "CPU" if device.platform == "cpu" else device.device_kind


def limit(problem: Problem, inputs: Inputs) -> tuple[Call, float]:
    """What no program can beat by much: a call, and how many times its time.

    Without a linear layer, a read and a write of the logits: `-z`. With one, three matmuls of the
    rows that count, as value and gradient need them: on an accelerator at the rate of the whole
    product, as those work best on large ones; on a CPU, the memory of which that might fill, at
    that of a large part of it.
    """
    if problem.features:
        on_cpu = jax.default_backend() == "cpu"
        block = min(problem.classes, 8192) if on_cpu else problem.classes
        hidden = inputs["hidden"]
        kernel = inputs["kernel"][:, :block].astype(hidden.dtype)
        multiply = jax.jit(jnp.matmul)
        return (
            lambda: jax.block_until_ready(multiply(hidden, kernel)),
            3 * problem.classes / block * float(jnp.mean(inputs["labels"] != IGNORED)),
        )
    negate, logits = jax.jit(jnp.negative), inputs["logits"]
    return lambda: jax.block_until_ready(negate(logits)), 1.0
