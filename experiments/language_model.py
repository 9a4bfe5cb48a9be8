"""Trains a small transformer to continue text, its head a linear cross-entropy of `ce_jax`.

    python -m experiments.language_model

Instead of a `Dense` layer and a loss of its logits, the model returns hidden states, and
`linear_softmax_cross_entropy` takes them and the head's kernel: the logits `[tokens, vocabulary]`
never stand in memory, and loss and accuracy come from one pass. The text is this repository's own
README, its bytes the vocabulary, so nothing is downloaded. In 300 steps, half a minute of two CPU
cores, the loss falls from 6.1 to less than 0.1 nats per byte: it learns the text by heart.

The batch is spread over all devices, also those of several processes, and so is the head with what
the optimizer keeps of it: its width over the devices that share the batch (FSDP), its classes over
`--tensor-parallel` many.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import ce_jax
from experiments.output import console as show
from experiments.output import files, runs
from experiments.output.errors import RunError, reported
from experiments.processes import group
from experiments.training.transformer import VOCABULARY, WIDTH, LanguageModel

README = Path(__file__).parents[1] / "README.md"
PADDING = -100

# Steps between two reports, each with a checkpoint.
STRETCH = 50

Params: TypeAlias = nnx.State[Any, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    steps: int
    length: int
    batch_size: int
    parts: int
    learning_rate: float
    tied: bool
    seed: int


class Tally(NamedTuple):
    """Sums over tokens, so that parts of a batch can be added."""

    loss: ce_jax.Ratio
    hits: jax.Array


def tally(model: LanguageModel, text: jax.Array, mesh: Mesh) -> Tally:
    """Loss and hits of predicting each byte of `text[:, 1:]` from those before it, in one pass."""
    labels = text[:, 1:]
    head, class_axis = model.head()
    loss = ce_jax.on_mesh(
        ce_jax.linear_softmax_cross_entropy, mesh, rows="data", classes="model", width="data"
    )
    table = jax.lax.with_sharding_constraint(
        model.tokens.embedding[...], NamedSharding(mesh, PartitionSpec())
    )
    sums, found = loss(
        model(text[:, :-1].clip(0), table),
        head[...],
        labels,
        class_axis=class_axis,
        ignore_index=PADDING,
        reduction="ratio",
        return_statistics=True,
    )
    return Tally(sums, jnp.sum(found.argmax == labels, dtype=jnp.int32))


def gradients(model: LanguageModel, text: jax.Array, mesh: Mesh) -> tuple[Tally, Params]:
    """Sums and the mean's gradient, over a batch that is held in memory one part at a time.

    The parts' denominators differ where some rows are padding, so sums are added and divided once:
    the gradient is that of the whole batch.

    Args:
      model: what to differentiate, by its parameters.
      text: byte ids `[parts, rows, length + 1]`.
      mesh: devices over which its rows and the head are spread.
    """
    graph, params = nnx.split(model, nnx.Param)

    def of_part(params: Params, part: jax.Array) -> tuple[jax.Array, Tally]:
        sums = tally(nnx.merge(graph, params), part, mesh)
        return sums.loss.total, sums

    def add(carry: tuple[Tally, Params], part: jax.Array) -> tuple[tuple[Tally, Params], None]:
        slopes, sums = jax.grad(of_part, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, carry, (sums, slopes)), None

    nothing = Tally(ce_jax.Ratio(jnp.zeros(()), jnp.zeros(())), jnp.zeros((), jnp.int32))
    start = (nothing, jax.tree.map(jnp.zeros_like, params))
    (sums, slopes), _ = jax.lax.scan(add, start, text)
    tokens = jnp.maximum(sums.loss.denominator, 1)
    return sums, jax.tree.map(lambda slope: slope / tokens, slopes)


class Trainer:
    """A model with its optimizer on a mesh of devices.

    Args:
      config: what to train and how.
      tensor_parallel: over how many devices the classes are spread.
      devices: on what; by default all there are. Those that do not share the classes share the
        batch.

    Attributes:
      mesh: the devices in use.
      state: parameters and what the optimizer keeps. `step` takes it for its own.
    """

    def __init__(
        self, config: Config, tensor_parallel: int, devices: Sequence[jax.Device] | None = None
    ):
        self.config = config
        self.mesh = make_mesh(config, tensor_parallel, devices or jax.devices())
        self._by_row = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        model = LanguageModel(config.length, tied=config.tied, rngs=nnx.Rngs(config.seed))
        head, class_axis = model.head()
        spec = ("data", "model") if class_axis == 1 else ("model", "data")
        head[...] = group.place(head[...], NamedSharding(self.mesh, PartitionSpec(*spec)))
        optimizer = nnx.Optimizer(model, optax.adamw(config.learning_rate), wrt=nnx.Param)
        self._graph, state = nnx.split((model, optimizer))
        self.state: Params = jax.tree.map(self._settle, state)
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=(where, None))

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        model, _ = nnx.merge(self._graph, self.state)
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    def step(self, text: np.ndarray) -> Tally:
        """One step of the optimizer on byte ids `[parts, rows, length + 1]`."""
        self.state, sums = self._step(self.state, group.place(text, self._by_row))
        return sums

    def _settle(self, leaf: jax.Array) -> jax.Array:
        """What belongs to the head stays where that is; everything else goes to all devices."""
        on_mesh = isinstance(leaf.sharding, NamedSharding)
        return leaf if on_mesh else group.place(leaf, NamedSharding(self.mesh, PartitionSpec()))

    def _update(self, state: Params, text: jax.Array) -> tuple[Params, Tally]:
        model, optimizer = nnx.merge(self._graph, state)
        sums, slopes = gradients(model, text, self.mesh)
        optimizer.update(model, slopes)
        return nnx.state((model, optimizer)), sums


def make_mesh(config: Config, tensor_parallel: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of as many devices as share the work evenly; its axes are "data" and "model".

    Raises:
      RunError: no number of devices does.
    """
    rows = config.batch_size // config.parts

    def evenly(count: int) -> bool:
        data, rest = divmod(count, tensor_parallel)
        return rest == 0 and data > 0 and rows % data == 0 and WIDTH % data == 0

    used = group.sharing(devices, evenly)
    if not used or VOCABULARY % tensor_parallel:
        raise RunError(
            f"--tensor-parallel {tensor_parallel} does not go with {len(devices)} devices: it has "
            f"to divide {VOCABULARY} classes, all processes have to take part with equally many "
            f"devices, and these have to share {rows} rows evenly"
        )
    shape = (len(used) // tensor_parallel, tensor_parallel)
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=used)


def rows_of(text: bytes, length: int) -> np.ndarray:
    """Paragraphs, cut into rows of `length + 1` bytes that share one, padded at the end."""
    rows = [
        paragraph[first : first + length + 1]
        for paragraph in text.split(b"\n\n")
        for first in range(0, len(paragraph) - 1, length)
    ]
    out = np.full((len(rows), length + 1), PADDING, np.int32)
    for row, part in zip(out, rows, strict=True):
        row[: len(part)] = list(part)
    return out


def batch_of(rows: np.ndarray, config: Config, step: int) -> np.ndarray:
    """The rows of a step `[parts, rows, length + 1]`: they depend on seed and step alone."""
    draw = np.random.default_rng((config.seed, step))
    chosen = rows[draw.integers(len(rows), size=config.batch_size)]
    return chosen.reshape(config.parts, -1, rows.shape[-1])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    text: Annotated[
        Path, typer.Option(help="File to learn.", show_default="the README of ce_jax")
    ] = README,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 300,
    length: Annotated[int, typer.Option(min=2, help="How many bytes the model sees at once.")] = 64,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows of text per step, drawn with replacement.")
    ] = 32,
    parts: Annotated[
        int,
        typer.Option(
            min=1, help="Compute the gradient in so many parts of the batch, to save memory."
        ),
    ] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.")] = 3e-3,
    tied: Annotated[bool, typer.Option(help="Use the embedding table as the head, too.")] = True,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the initial parameters and of the batches.")
    ] = 0,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Number of devices over which the classes are spread.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for metrics and checkpoints. It has to be new or empty, unless --resume "
            "is given.",
            show_default="runs/language_model-DATE-TIME",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out. Give the same options again."),
    ] = False,
) -> None:
    """Train a byte-level transformer with the linear cross-entropy of ce_jax as its head.

    Exit status: 0 for a finished run, 1 for a text or a folder that cannot be used, 2 for wrong
    options, 130 for an interrupt.
    """
    if batch_size % parts:
        raise typer.BadParameter(f"--parts {parts} does not divide --batch-size {batch_size}")
    if resume and out is None:
        raise typer.BadParameter("--resume needs the folder of the run: add --out")
    config = Config(steps, length, batch_size, parts, learning_rate, tied, seed)
    started = group.common_time()
    folder = files.folder_of(out, "language_model", started)
    cure = f"The same command with --out {folder} --resume goes on from the last checkpoint."
    with reported(folder, cure):
        run(config, text, tensor_parallel, folder, resume)


def run(config: Config, text: Path, tensor_parallel: int, path: Path, resume: bool) -> None:
    """Trains in a folder, or goes on with the training in it, and shows the result."""
    console = Console(quiet=not group.is_first())
    recorded = runs.read_config(path) if resume else None
    if recorded is None:
        runs.require_fresh(path)
    learnt = text.read_bytes()
    rows = rows_of(learnt, config.length)
    if not len(rows):
        raise RunError(f"{text}: no paragraph of two bytes in it")
    facts = {
        "experiment": "language_model",
        "options": dataclasses.asdict(config),
        "text": zlib.crc32(learnt),
    }
    if recorded is not None:
        check_unchanged(path, recorded, facts, text)
    group.require_agreement(
        {
            "options": [facts, tensor_parallel],
            "--out": str(path.absolute()),
            "run in --out": recorded,
        }
    )
    trainer = Trainer(config, tensor_parallel)
    if recorded is None and group.is_first():
        runs.create(path, facts)
    with runs.RunFolder(path, {"text": str(text)}) as folder:
        devices = group.described(list(trainer.mesh.devices.flat))
        show.setting(
            console,
            {
                "text": f"{text}: {len(rows)} rows of at most {config.length} bytes",
                "model": f"{trainer.parameters:,} parameters, "
                f"head {'tied' if config.tied else 'of its own'}",
                "batch": f"{config.batch_size} rows in {config.parts} "
                f"part{'s'[: config.parts > 1]}",
                "devices": f"{devices}; batch over {trainer.mesh.shape['data']}, "
                f"classes over {trainer.mesh.shape['model']}",
                "folder": str(folder.path),
            },
        )
        fit(trainer, rows, folder, console)


def check_unchanged(
    path: Path, recorded: dict[str, Any], facts: dict[str, Any], text: Path
) -> None:
    """Raises RunError unless the run in a folder is one of the same options and text."""
    if recorded.keys() != facts.keys() or recorded["experiment"] != facts["experiment"]:
        raise RunError(f"{path / runs.CONFIG_FILE}: not the configuration of this script")
    runs.require_same(path, recorded["options"], facts["options"])
    if recorded["text"] != facts["text"]:
        raise RunError(f"{path}: the run in it learns another text than {text} holds now")


def fit(trainer: Trainer, rows: np.ndarray, folder: runs.RunFolder, console: Console) -> None:
    """Trains from where the folder left off to the last step, recording it at every stretch."""
    done = 0
    if folder.epochs_done:
        trainer.state = folder.restore(trainer.state)
        done = folder.history[-1]["step"]
        console.print(f"resuming after step {done} of {trainer.config.steps}")
    steps = trainer.config.steps
    for step in range(done + 1, steps + 1):
        sums = trainer.step(batch_of(rows, trainer.config, step))
        if step == 1 or step % STRETCH == 0 or step == steps:
            sums = jax.device_get(sums)
            loss = float(sums.loss.mean())
            accuracy = float(sums.hits / sums.loss.denominator)
            if not math.isfinite(loss):
                raise RunError(f"the loss is {loss} at step {step}; try a smaller --learning-rate")
            folder.record_epoch({"step": step, "loss": loss, "accuracy": accuracy}, trainer.state)
            console.print(f"step {step:4d}: loss {loss:.4f} nats, accuracy {accuracy:.2%}")
    group.wait_for_all("the run is finished")


if __name__ == "__main__":
    app()
