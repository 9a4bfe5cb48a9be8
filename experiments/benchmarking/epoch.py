"""One epoch of training a 784-512-256-10 perceptron, with a loss in JAX or all of it in torch.

Images are random bytes of MNIST's size: what they show does not change the time. Both sides hold
them on the device as bytes, shuffle, scale, and take a step of Adam for each 128 of them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarking import jax_peers
from experiments.benchmarking.measure import BASELINE, OURS, Row, compare, prepare
from experiments.benchmarking.problems import Problem
from experiments.benchmarking.programs import Loss, Peer, Program, jax_temporaries, kind_of_device
from experiments.benchmarking.timing import Effort
from experiments.benchmarking.torch_peers import import_torch, torch_device

WIDTHS = (784, 512, 256, 10)
BATCH = 128
LEARNING_RATE = 1e-3
EXAMPLES, QUICK_EXAMPLES = 60000, 6400

_OPERATION = "mnist epoch"


def rows(effort: Effort, everybody: Sequence[Peer], *, quick: bool) -> list[Row]:
    """The time of an epoch for some of the peers, unless they are missing."""
    examples = QUICK_EXAMPLES if quick else EXAMPLES
    problem = Problem(_OPERATION, examples, WIDTHS[-1], "float32", WIDTHS[0])
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (examples, WIDTHS[0]), dtype=np.uint8)
    labels = draw.integers(0, WIDTHS[-1], examples, dtype=np.int32)
    kernels = [
        draw.standard_normal((a, b)).astype(np.float32) * (2 / a) ** 0.5
        for a, b in pairwise(WIDTHS)
    ]
    losses = jax_peers.losses()
    missing = {peer.name: peer.missing for peer in everybody}

    def jax_peer(name: str, loss: Loss) -> Peer:
        return _peer(name, lambda: _jax_program(loss, images, labels, kernels), missing[name])

    def torch_peer(name: str, *, compiled: bool) -> Peer:
        return _peer(name, lambda: _torch_program(images, labels, kernels, compiled), missing[name])

    peers = [
        jax_peer(OURS, losses[OURS]["integer"]),
        jax_peer(BASELINE, losses[BASELINE]["integer"]),
        torch_peer("torch", compiled=False),
        torch_peer("torch.compile", compiled=True),
    ]
    found, programs = prepare(problem, peers, lambda peer: peer.build(problem, {}))
    return found + compare(problem, programs, effort)


def _peer(name: str, build: Any, missing: str) -> Peer:
    return Peer(name, frozenset({_OPERATION}), lambda *_: build(), missing)


def _jax_program(
    loss: Loss, images: np.ndarray, labels: np.ndarray, kernels: list[np.ndarray]
) -> Program:
    optimizer = optax.adam(LEARNING_RATE)
    params = [(jnp.asarray(k), jnp.zeros(k.shape[1])) for k in kernels]
    images_, labels_ = jnp.asarray(images), jnp.asarray(labels)

    def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        *hidden, (kernel, bias) = params
        for k, b in hidden:
            x = jax.nn.relu(x @ k + b)
        return loss(x @ kernel + bias, y)

    def epoch(params: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        steps = len(images) // BATCH
        order = jax.random.permutation(key, len(images))[: steps * BATCH]

        def step(state: Any, batch: jax.Array) -> Any:
            params, opt_state = state
            x = images[batch].astype(jnp.float32) / 255
            value, gradient = jax.value_and_grad(mean_loss)(params, x, labels[batch])
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        state = (params, optimizer.init(params))
        return jax.lax.scan(step, state, order.reshape(steps, BATCH))

    args = (params, jax.random.key(0), images_, labels_)
    run = jax.jit(epoch)
    return Program(
        forward=None,
        gradient=lambda: jax.block_until_ready(run(*args)),
        temporaries=lambda: jax_temporaries(run, *args),
        device=kind_of_device(),
    )


def _torch_program(
    images: np.ndarray, labels: np.ndarray, kernels: list[np.ndarray], compiled: bool
) -> Program:
    torch: Any = import_torch()
    device = torch_device(torch)
    layers: list[Any] = []
    for kernel in kernels:
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T))
            layer.bias.zero_()
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    images_ = torch.from_numpy(images).to(device)
    labels_ = torch.from_numpy(labels).to(device, torch.int64)

    def mean_loss(x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(x.float() / 255), y)

    objective = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss

    def epoch() -> None:
        order = torch.randperm(len(images_), device=device)
        for start in range(0, len(images_) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            optimizer.zero_grad(set_to_none=True)
            objective(images_[batch], labels_[batch]).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Program(forward=None, gradient=epoch, temporaries=lambda: None, device=name)
