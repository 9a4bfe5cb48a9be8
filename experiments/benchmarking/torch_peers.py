"""torch's losses, and those written for it. All are optional, torch itself too."""

import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarking.problems import (
    ARGUMENTS,
    ENTROPY_BONUS,
    IGNORED,
    LINEAR,
    SMOOTHING,
    Problem,
)
from experiments.benchmarking.programs import Inputs, Loss, Peer, Program


def import_torch() -> Any:
    """The module, or None where it is not installed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler talks on standard error
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def torch_device(torch: Any) -> str:
    """Where torch's programs run: on the GPU if JAX's do and torch can."""
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def peers(*, compiled: bool) -> list[Peer]:
    """All peers on torch, those that are not installed among them.

    Args:
      compiled: whether `torch.compile` takes part; compiling takes it minutes.
    """
    torch = import_torch()
    everything = frozenset(ARGUMENTS)
    on_gpu = torch is not None and torch_device(torch) == "cuda"
    chunked_missing = _torch_missing(torch, "nn.functional.linear_cross_entropy")
    return [
        Peer("torch", everything, _build(_torch), _torch_missing(torch)),
        Peer(
            "torch.compile",
            everything,
            _build(_compiled),
            _torch_missing(torch) or ("" if compiled else "left out by --quick"),
        ),
        Peer("torch chunked", frozenset(LINEAR), _build(_chunked), chunked_missing),
        Peer(
            "liger",
            frozenset({"integer", "ignored", "weighted", "smoothed", *LINEAR}),
            _build(_liger),
            _gpu_missing("liger_kernel", on_gpu),
        ),
        Peer(
            "cut-cross-entropy",
            frozenset(LINEAR),
            _build(_cut),
            _gpu_missing("cut_cross_entropy", on_gpu),
        ),
        Peer(
            "cut-cross-entropy exact",
            frozenset(LINEAR),
            _build(partial(_cut, filter_eps=None)),
            _gpu_missing("cut_cross_entropy", on_gpu),
        ),
    ]


def _torch_missing(torch: Any, function: str = "") -> str:
    if torch is None:
        return "not installed"
    for name in function.split(".") if function else ():
        torch = getattr(torch, name, None)
    return f"not in this version: {function}" if torch is None else ""


def _gpu_missing(module: str, on_gpu: bool) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    return "" if on_gpu else "needs a GPU"


def _torch(torch: Any) -> dict[str, Loss]:
    functional = torch.nn.functional
    cross_entropy = functional.cross_entropy

    def statistics(z: Any, y: Any) -> tuple[Any, Any]:
        log_p = functional.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        picked = log_p.gather(-1, y[:, None])[:, 0]
        return -(picked + ENTROPY_BONUS * entropy).mean(), z.argmax(-1)

    return {
        "integer": cross_entropy,
        "one-hot": cross_entropy,
        "ignored": partial(cross_entropy, ignore_index=IGNORED),
        "weighted": cross_entropy,
        "smoothed": partial(cross_entropy, label_smoothing=SMOOTHING),
        "sigmoid": functional.binary_cross_entropy_with_logits,
        "statistics": statistics,
        **_of_layer(
            lambda h, k, y, **options: cross_entropy(functional.linear(h, k), y, **options)
        ),
    }


def _of_layer(loss: Loss) -> dict[str, Loss]:
    """The operations with a linear layer. No loss of torch multiplies tensors of two dtypes."""
    return {
        "linear": loss,
        "masked": partial(loss, ignore_index=IGNORED),
        "mixed": lambda h, k, y: loss(h, k.to(h.dtype), y),
    }


def _compiled(torch: Any) -> dict[str, Loss]:
    torch.compiler.reset()  # or the limit on recompilations would silently turn it off
    return {
        operation: torch.compile(function, dynamic=False)
        for operation, function in _torch(torch).items()
    }


def _chunked(torch: Any) -> dict[str, Loss]:
    options = torch.nn.LinearCrossEntropyOptions()
    return _of_layer(partial(torch.nn.functional.linear_cross_entropy, options=options))


def _liger(_: Any) -> dict[str, Loss]:
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    # It writes the gradient over the logits, which every call needs again.
    return {
        "integer": lambda z, y: functional.liger_cross_entropy(z.clone(), y),
        "ignored": lambda z, y: functional.liger_cross_entropy(z.clone(), y, ignore_index=IGNORED),
        "weighted": lambda z, y, w: functional.liger_cross_entropy(z.clone(), y, w),
        "smoothed": lambda z, y: functional.liger_cross_entropy(
            z.clone(), y, label_smoothing=SMOOTHING
        ),
        **_of_layer(functional.liger_fused_linear_cross_entropy),
    }


def _cut(_: Any, **options: Any) -> dict[str, Loss]:
    # By default it leaves out blocks of the gradient in which no probability is above 2^-12.
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _of_layer(partial(function, **options))


def _build(
    functions: Callable[[Any], Mapping[str, Loss]],
) -> Callable[[Problem, Inputs], Program]:
    def build(problem: Problem, inputs: Inputs) -> Program:
        torch = import_torch()
        return _program(torch, functions(torch)[problem.formula], problem, inputs)

    return build


def _program(torch: Any, loss: Loss, problem: Problem, inputs: Inputs) -> Program:
    device = torch_device(torch)
    args = [_tensor(torch, name, array, problem, device) for name, array in inputs.items()]
    _, differentiated = ARGUMENTS[problem.formula]
    leaves = [arg.requires_grad_() for arg in args[:differentiated]]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def forward() -> Any:
        with torch.no_grad():
            value = loss(*args)
        wait()
        return value

    def gradient() -> Any:
        value = loss(*args)
        mean = value[0] if problem.formula == "statistics" else value
        gradients = torch.autograd.grad(mean, leaves)
        wait()
        return value, gradients

    def temporaries() -> int:
        return _temporaries(torch, gradient, leaves, device)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Program(forward, gradient, temporaries, name)


def _tensor(torch: Any, name: str, array: jax.Array, problem: Problem, device: str) -> Any:
    if device == "cpu":
        array = jax.device_put(array, jax.devices("cpu")[0])
    tensor = torch.from_dlpack(array)
    if name == "kernel":
        tensor = tensor.T.contiguous()  # torch's layers hold [classes, features]
    if name == "labels":
        return tensor.to(torch.int64)
    # Its class weights have the dtype of the logits.
    return tensor.to(getattr(torch, problem.dtype if name == "weight" else problem.dtype_of(name)))


def _temporaries(torch: Any, call: Callable[[], Any], results: Sequence[Any], device: str) -> int:
    """The most memory that a call holds at once, less its results: gradients like `results`."""
    kept = sum(x.element_size() * x.nelement() for x in results)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return max(0, torch.cuda.max_memory_allocated() - before - kept)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        outputs = call()
    del outputs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda event: event["ts"])
    sizes = [event["args"]["Bytes"] for event in allocations]
    return max(0, int(np.max(np.cumsum(sizes), initial=0)) - kept)
