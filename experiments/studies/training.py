"""Training all runs of a study at once: methods, seeds and conditions are one compiled program.

A run is one training of the perceptron. Runs differ in their seed, their images, their targets and
their loss, none of which changes a shape, so that `jax.vmap` makes a single training of all.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.output.errors import RunError
from experiments.training.loop import Recipe, make_optimizer
from experiments.training.mlp import MLP

HIDDEN = (256,)

_JUDGED_AT_ONCE = 500

# Maps logits `[batch, outputs]`, targets (a pytree of `[batch, ...]`) and what else the loss has to
# know, by name, to the mean over the batch.
Loss = Callable[[jax.Array, Any, dict[str, Any]], jax.Array]


class Runs(NamedTuple):
    """What is trained. The leading axis of every array counts the runs.

    Attributes:
      loss: int32 `[runs]`, the number of the loss.
      seed: int32 `[runs]`, of the initial parameters and the order of the images.
      rows: int32 `[runs, n]`, numbers of the images to learn from.
      targets: a pytree of `[runs, n, ...]`.
      given: what the losses have to know beyond that, by name, `[runs, ...]`.
      learnt: parameters of the losses, by name, trained along with the network's.
    """

    loss: np.ndarray
    seed: np.ndarray
    rows: np.ndarray
    targets: Any
    given: dict[str, Any]
    learnt: dict[str, Any]


def single(
    loss: int,
    seed: int,
    rows: np.ndarray,
    targets: Any,
    given: dict[str, Any] | None = None,
    learnt: dict[str, Any] | None = None,
) -> Runs:
    """One run, without the leading axis."""
    return Runs(
        np.array(loss, np.int32), np.array(seed, np.int32), rows, targets, given or {}, learnt or {}
    )


def side_by_side(runs: Sequence[Runs]) -> Runs:
    """Puts single runs together."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


class Trained(NamedTuple):
    """What came of the runs.

    Attributes:
      logits: `[runs, m, outputs]` of the images to be judged by.
      losses: `[runs, steps]`, each of its batch.
      learnt: the parameters of the losses after each step, `[runs, steps, ...]`.
    """

    logits: np.ndarray
    losses: np.ndarray
    learnt: dict[str, Any]


@dataclass(frozen=True)
class _Program:
    """All that is compiled in."""

    losses: tuple[Loss, ...]
    recipe: Recipe
    steps: int
    learnt_rate: float
    graph: Any
    mean: float
    std: float

    def optimizer(self) -> optax.GradientTransformation:
        network = make_optimizer(self.recipe, self.steps)
        learnt = optax.adam(self.learnt_rate)
        return optax.partition({"network": network, "learnt": learnt}, ("network", "learnt"))

    def logits(self, network: Any, pixels: jax.Array) -> jax.Array:
        """Of pixels as they are stored."""
        inputs = (pixels.astype(jnp.float32) - self.mean) / self.std
        return nnx.merge(self.graph, network)(inputs)


def train(
    losses: tuple[Loss, ...],
    recipe: Recipe,
    images: np.ndarray,
    runs: Runs,
    judged: np.ndarray,
    *,
    outputs: int,
    learnt_rate: float = 0.0,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Trains all runs and lets each of them look at other images.

    Args:
      losses: what `runs.loss` selects from.
      recipe: how, the same for every run.
      images: uint8 `[all, height, width]`, of which `runs.rows` selects.
      runs: what to train.
      judged: uint8 `[m, height, width]`, the images to look at after training.
      outputs: logits per image.
      learnt_rate: learning rate of `runs.learnt`, by Adam.
      on_epoch: called after each epoch with its mean loss.

    Raises:
      RunError: a loss is no longer finite.
    """
    features = int(np.prod(images.shape[1:]))
    networks = {
        seed: _network(seed, features=features, outputs=outputs) for seed in set(runs.seed.tolist())
    }
    graph = nnx.split(nnx.eval_shape(functools.partial(_mlp, 0, features, outputs)))[0]
    program = _Program(
        losses,
        recipe,
        runs.rows.shape[1] // recipe.batch_size,
        learnt_rate,
        graph,
        float(images.mean()),
        float(images.std()),
    )
    flat = jax.device_put(images.reshape(len(images), -1))
    runs = jax.device_put(runs)
    of_runs = [networks[seed] for seed in runs.seed.tolist()]
    state = _start(program, jax.tree.map(lambda *leaves: np.stack(leaves), *of_runs), runs.learnt)
    values, learnt = [], []
    for epoch in range(recipe.epochs):
        state, (of_epoch, learnt_then) = _epoch(program, state, flat, runs, epoch)
        values.append(np.asarray(of_epoch))
        learnt.append(jax.tree.map(np.asarray, learnt_then))
        if not np.isfinite(values[-1]).all():
            raise RunError(f"a loss is not finite in epoch {epoch + 1}")
        on_epoch(float(values[-1].mean()))
    logits = _look(program, state, judged.reshape(len(judged), -1))
    return Trained(
        np.asarray(logits),
        np.concatenate(values, 1),
        jax.tree.map(lambda *parts: np.concatenate(parts, 1), *learnt),
    )


def _mlp(seed: int, features: int, outputs: int) -> MLP:
    return MLP(features, outputs, hidden=HIDDEN, rngs=nnx.Rngs(jax.random.key(seed)))


# By itself, since what takes long to compile in it is the drawing of random numbers.
@functools.partial(jax.jit, static_argnames=("features", "outputs"))
def _network(seed: int, *, features: int, outputs: int) -> Any:
    return nnx.state(_mlp(seed, features, outputs), nnx.Param)


@functools.partial(jax.jit, static_argnames="program")
def _start(program: _Program, networks: Any, learnt: dict[str, Any]) -> Any:
    params = (networks, learnt)
    return params, jax.vmap(program.optimizer().init)(params)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _epoch(program: _Program, state: Any, images: jax.Array, runs: Runs, epoch: jax.Array) -> Any:
    batch_size, optimizer = program.recipe.batch_size, program.optimizer()

    def of_run(state: Any, run: Runs) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), run.seed), epoch)
        order = jax.random.permutation(key, len(run.rows))
        # What is left over at the end takes part in other epochs.
        batches = order[: program.steps * batch_size].reshape(program.steps, batch_size)

        def step(state: Any, batch: jax.Array) -> Any:
            params, opt_state = state
            pixels = images[run.rows[batch]]
            targets = jax.tree.map(lambda values: values[batch], run.targets)

            def mean_loss(params: Any) -> jax.Array:
                network, learnt = params
                logits = program.logits(network, pixels)
                return jax.lax.switch(
                    run.loss, program.losses, logits, targets, {**run.given, **learnt}
                )

            value, slopes = jax.value_and_grad(mean_loss)(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(slopes, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (value, params[1])

        return jax.lax.scan(step, state, batches)

    return jax.vmap(of_run)(state, runs)


@functools.partial(jax.jit, static_argnames="program")
def _look(program: _Program, state: Any, judged: jax.Array) -> jax.Array:
    (networks, _), _ = state
    return jax.vmap(
        lambda network: jax.lax.map(
            functools.partial(program.logits, network), judged, batch_size=_JUDGED_AT_ONCE
        )
    )(networks)
