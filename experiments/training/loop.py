"""Training a classifier: one compiled scan per epoch, on one device or on many.

Everything random in an epoch follows from the seed and the number of the epoch, and nothing else
is carried over but `TrainState`. So an epoch gives the same result whether the epochs before it
ran in this process or in one that was killed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ce_jax import Ratio
from experiments.data.datasets import Dataset
from experiments.output.errors import RunError
from experiments.output.report import Evaluation
from experiments.output.runs import RunFolder
from experiments.processes.group import described, place, sharing
from experiments.training.mlp import HIDDEN, MLP
from experiments.training.objectives import Objective

Params: TypeAlias = nnx.State[Any, Any]

_BATCH_AXIS = "batch"
_WARMUP_FRACTION = 0.1


@dataclass(frozen=True)
class Recipe:
    """How the optimizer goes through the examples."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Settings(Recipe):
    """Choices that decide the result of a training run."""

    dropout: float
    seed: int


class TrainState(NamedTuple):
    """What changes from step to step."""

    params: Params
    opt_state: optax.OptState


class Examples(NamedTuple):
    """Examples on the device: pixels as stored, which quarters the memory of floats."""

    images: jax.Array
    labels: jax.Array


class Tally(NamedTuple):
    """Sums over examples, from which the means of an epoch follow."""

    loss: Ratio
    correct: jax.Array
    examples: jax.Array


def make_mesh(batch_size: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over as many of the devices as share the batch evenly, of each process equally many.

    Raises:
      RunError: the batch cannot be shared evenly by the processes.
    """
    used = sharing(devices, lambda count: batch_size % count == 0)
    if not used:
        raise RunError(f"--batch-size {batch_size} is not a multiple of the number of processes")
    return jax.make_mesh((len(used),), (_BATCH_AXIS,), (AxisType.Auto,), devices=used)


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine decay to zero; biases do not decay."""
    steps = recipe.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=int(_WARMUP_FRACTION * steps),
        decay_steps=steps,
    )
    return optax.adamw(
        schedule,
        weight_decay=recipe.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )


class Trainer:
    """Holds the data on the devices and the compiled functions of one run.

    Args:
      dataset: what to learn.
      objective: by which loss.
      settings: how.
      devices: on what; by default all there are. The batch is spread over them.

    Raises:
      RunError: a batch would be larger than the training set.
    """

    def __init__(
        self,
        dataset: Dataset,
        objective: Objective,
        settings: Settings,
        devices: Sequence[jax.Device] | None = None,
    ):
        images = len(dataset.train_labels)
        if settings.batch_size > images:
            raise RunError(
                f"--batch-size {settings.batch_size} is above {images}, the number of training "
                f"images of {dataset.name}"
            )
        devices = jax.devices() if devices is None else devices
        self.dataset = dataset
        self.settings = settings
        self.mesh = make_mesh(settings.batch_size, devices)
        self._idle_devices = len(devices) - self.mesh.size
        self._objective = objective
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._by_batch = NamedSharding(self.mesh, PartitionSpec(_BATCH_AXIS))
        init_key, epoch_key = jax.random.split(jax.random.key(settings.seed))
        self._key = self._replicate(jax.random.key_data(epoch_key))
        self._graph, self._initial_params = nnx.split(
            MLP(
                dataset.features,
                objective.outputs,
                dropout=settings.dropout,
                rngs=nnx.Rngs(init_key),
            )
        )
        self._optimizer = make_optimizer(settings, -(-images // settings.batch_size))
        self._pixel_mean = float(dataset.train_images.mean())
        self._pixel_std = float(dataset.train_images.std())
        self._train = self._place(dataset.train_images, dataset.train_labels)
        self._test = self._place(dataset.test_images, dataset.test_labels)
        # A replicated result is what the next epoch was compiled for.
        self._jit_epoch = jax.jit(self._epoch, donate_argnums=0, out_shardings=self._replicated)
        self._run_epoch: Callable[..., tuple[TrainState, Tally]] = self._jit_epoch
        self._run_predictions = jax.jit(self._predictions, out_shardings=self._replicated)

    @property
    def devices(self) -> str:
        """Number and kind of the devices in use."""
        idle = self._idle_devices
        note = f", {idle} more idle as they cannot share the batch evenly" if idle else ""
        return described(list(self.mesh.devices.flat)) + note

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each layer, from the pixels to the logits."""
        return (self.dataset.features, *HIDDEN, self._objective.outputs)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._initial_params))

    def initial_state(self) -> TrainState:
        """The state before the first epoch."""
        state = TrainState(self._initial_params, self._optimizer.init(self._initial_params))
        return jax.tree.map(self._replicate, state)

    def compile(self) -> None:
        """Compiles the epoch now rather than at its first run, so that both can be timed."""
        arguments = self._epoch_arguments(self.initial_state(), 0)
        self._run_epoch = self._jit_epoch.lower(*arguments).compile()

    def run_epoch(self, state: TrainState, epoch: int) -> tuple[TrainState, Tally]:
        """Trains on every example once, in an order and with dropout that depend on the epoch.

        The buffers of `state` are reused for the result; `state` is gone afterwards.
        """
        return self._run_epoch(*self._epoch_arguments(state, epoch))

    def evaluate(self, state: TrainState) -> Evaluation:
        """Predicts the test set."""
        loss, log_probs = self._run_predictions(state.params, self._test)
        return Evaluation(
            loss=float(jax.device_get(loss).mean()),
            log_probs=np.asarray(log_probs),
            labels=self.dataset.test_labels,
            class_names=self.dataset.class_names,
        )

    def _epoch_arguments(self, state: TrainState, epoch: int) -> tuple[Any, ...]:
        return state, self._train, self._key, self._replicate(np.int32(epoch))

    def _place(self, images: np.ndarray, labels: np.ndarray) -> Examples:
        flat = images.reshape(len(images), -1)
        return Examples(self._replicate(flat), self._replicate(labels))

    def _replicate(self, array: Any) -> jax.Array:
        return place(array, self._replicated)

    def _epoch(
        self, state: TrainState, examples: Examples, key: jax.Array, epoch: jax.Array
    ) -> tuple[TrainState, Tally]:
        epoch_key = jax.random.fold_in(jax.random.wrap_key_data(key), epoch)
        shuffle_key, dropout_key = jax.random.split(epoch_key)
        order = jax.random.permutation(shuffle_key, len(examples.labels))
        rows, where = _batches(order, self.settings.batch_size)

        def step(state: TrainState, batch: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            rows, where, number = batch
            images, labels = self._take(examples, rows)

            def mean_loss(params: Params) -> tuple[jax.Array, tuple[Ratio, jax.Array]]:
                model = nnx.merge(self._graph, params)
                logits = model(images, jax.random.fold_in(dropout_key, number))
                loss = self._objective.loss(logits, labels, where)
                return loss.mean(), (loss, logits)

            grads, (loss, logits) = jax.grad(mean_loss, has_aux=True)(state.params)
            # Optax's Adam raises a Python float to an integer power, which strict promotion of
            # dtypes would refuse.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
            predicted = self._objective.log_probs(logits).argmax(axis=-1)
            tally = Tally(loss, ((predicted == labels) & where).sum(), where.sum())
            return TrainState(optax.apply_updates(state.params, updates), opt_state), tally

        state, tallies = jax.lax.scan(step, state, (rows, where, jnp.arange(len(rows))))
        return state, jax.tree.map(lambda values: values.sum(axis=0), tallies)

    def _predictions(self, params: Params, examples: Examples) -> tuple[Ratio, jax.Array]:
        count = len(examples.labels)
        rows, _ = _batches(jnp.arange(count), self.settings.batch_size)
        model = nnx.merge(self._graph, params)
        logits = jax.lax.map(lambda rows: model(self._take(examples, rows).images), rows)
        logits = logits.reshape(-1, self._objective.outputs)[:count]
        loss = self._objective.loss(logits, examples.labels, jnp.ones(count, bool))
        return loss, self._objective.log_probs(logits)

    def _take(self, examples: Examples, rows: jax.Array) -> Examples:
        """Standardised images and labels of some rows, spread over the devices."""
        rows = jax.lax.with_sharding_constraint(rows, self._by_batch)
        pixels = examples.images[rows].astype(jnp.float32)
        return Examples((pixels - self._pixel_mean) / self._pixel_std, examples.labels[rows])


def fit(
    trainer: Trainer, folder: RunFolder, on_epoch: Callable[[dict[str, Any]], None]
) -> Evaluation:
    """Trains from where the folder left off to the last epoch, recording each epoch there.

    Args:
      trainer: what to train.
      folder: the run, fresh or resumed.
      on_epoch: called with the metrics of each epoch.

    Returns:
      The predictions of the trained model.

    Raises:
      RunError: the loss is no longer finite. The epoch in which that happened is not recorded.
    """
    state = trainer.initial_state()
    if folder.epochs_done:
        state = folder.restore(state)
    evaluation = trainer.evaluate(state)
    for epoch in range(folder.epochs_done, trainer.settings.epochs):
        start = time.perf_counter()
        state, tally = trainer.run_epoch(state, epoch)
        evaluation = trainer.evaluate(state)
        seconds = time.perf_counter() - start
        train_loss = float(jax.device_get(tally.loss).mean())
        if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
            raise RunError(
                f"the loss is {train_loss} in training and {evaluation.loss} on the test set after "
                f"epoch {epoch + 1}; try a smaller --learning-rate"
            )
        row = {
            "train_loss": train_loss,
            "train_accuracy": int(tally.correct) / int(tally.examples),
            **evaluation.summary,
            "seconds": seconds,
        }
        folder.record_epoch(row, state)
        on_epoch(folder.history[-1])
    return evaluation


def _batches(order: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Splits row numbers into batches `[steps, batch_size]` and says which of them count.

    The last batch is filled up with row 0, masked out, so that all have one shape.
    """
    steps = -(-len(order) // batch_size)
    padding = steps * batch_size - len(order)
    rows = jnp.pad(order, (0, padding)).reshape(steps, batch_size)
    where = (jnp.arange(steps * batch_size) < len(order)).reshape(steps, batch_size)
    return rows, where
