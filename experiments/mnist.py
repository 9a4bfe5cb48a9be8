"""Trains a 784-512-256-10 multilayer perceptron on MNIST with a loss of `ce_jax`.

    python -m experiments.mnist

Expect 98.6 % test accuracy within half a minute of training on two CPU cores. Without the MNIST
files and without a network it trains on scikit-learn's small digits instead, and says so.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any

import flax
import jax
import optax
import typer
from rich.console import Console

from experiments.data import datasets
from experiments.output import console as show
from experiments.output import files, plots, runs
from experiments.output.errors import RunError, reported
from experiments.processes import group
from experiments.training.loop import Settings, Trainer, fit
from experiments.training.objectives import SIGMOID_LOSSES, LossName, make_objective

# By data set: the digits are 1437 training images where MNIST has 60000.
DEFAULT_EPOCHS = {"mnist": 12, "digits": 40}
DEFAULT_BATCH_SIZE = {"mnist": 500, "digits": 32}
DEFAULT_LEARNING_RATE = {"mnist": 4e-3, "digits": 2e-3}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Everything that decides the result of a run. It is what a resumed run has to agree with."""

    dataset: datasets.DatasetName
    loss: LossName
    label_smoothing: float
    z_loss: float


def by_dataset(values: dict[str, Any]) -> str:
    """How --help shows a default that depends on the data set."""
    return f"{values['mnist']}; on digits {values['digits']}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# The options that `Config` records default to None, "not given": a resumed run takes them from the
# run it continues, and has to tell that from a value somebody asked for.
@app.command()
def main(
    loss: Annotated[
        LossName | None,
        typer.Option(
            help="What to train with. softmax: cross-entropy with integer labels. one-hot: the "
            "same with one-hot labels. one-vs-rest: one sigmoid for each class. even-odd: a single "
            "sigmoid that tells whether the digit is odd. weighted: softmax with classes weighted "
            "by inverse frequency.",
            show_default="softmax",
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of each target that is spread evenly over the classes.",
            show_default="0",
        ),
    ] = None,
    z_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of the squared log-partition function. Softmax losses only.",
            show_default="0",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training set.", show_default=by_dataset(DEFAULT_EPOCHS)
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per step of the optimizer, at most as many as there are for training.",
            show_default=by_dataset(DEFAULT_BATCH_SIZE),
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of AdamW's learning rate, after a warm-up and before a cosine decay.",
            show_default=by_dataset(DEFAULT_LEARNING_RATE),
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0, help="AdamW's decay of the kernels; biases do not decay.", show_default="0.3"
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the hidden units that each step of training drops, below 1.",
            show_default="0.2",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help="Seed of the initial parameters, the order of the examples and dropout.",
            show_default="0",
        ),
    ] = None,
    dataset: Annotated[
        datasets.DatasetName | None,
        typer.Option(
            help="What to train on. mnist: MNIST, or an error where there is none. digits: "
            "scikit-learn's 8x8 digits. auto: MNIST where it is at hand or can be downloaded, "
            "otherwise the digits.",
            show_default="auto",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the four MNIST files, plain or .gz. Without one they are downloaded "
            "into your cache folder, once.",
            show_default=f"${datasets.DATA_DIR_VARIABLE} where it is set",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for configuration, metrics, TensorBoard events, checkpoints and plots. It "
            "has to be new or empty, unless --resume is given.",
            show_default="runs/mnist-DATE-TIME",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the interrupted run in --out after its last finished epoch. It keeps "
            "its options.",
        ),
    ] = False,
) -> None:
    """Train a 784-512-256-10 MLP on MNIST with a cross-entropy of ce_jax.

    Exit status: 0 for a finished run, 1 for data or a folder that cannot be used, 2 for wrong
    options, 130 for an interrupt.
    """
    given = {
        "loss": loss,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "seed": seed,
        "dataset": dataset,
    }
    given = {name: value for name, value in given.items() if value is not None}
    check_options(given)
    if resume and out is None:
        raise typer.BadParameter("--resume needs the folder of the run: add --out")
    if data_dir is not None and given.get("dataset") == "digits":
        raise typer.BadParameter("--data-dir is for MNIST: leave it out with --dataset digits")
    started = group.common_time()
    folder = files.folder_of(out, "mnist", started)
    with reported(folder, f"--out {folder} --resume goes on from the last finished epoch."):
        run(given, data_dir, folder, resume)


def run(given: dict[str, Any], data_dir: Path | None, path: Path, resume: bool) -> None:
    """Trains, or continues to train, in a folder, and shows and saves the result.

    Args:
      given: the options somebody asked for, under the names of `Config`.
      data_dir: folder of the MNIST files.
      path: folder of the run.
      resume: whether to continue the run in that folder.
    """
    console = Console(quiet=not group.is_first())
    recorded = runs.read_config(path) if resume else None
    if recorded is None:
        runs.require_fresh(path)
        dataset = datasets.load(given.get("dataset", "auto"), data_dir)
        config = new_config(given, dataset.name)
    else:
        config = recorded_config(path, recorded)
        # "auto" may stand for either data set.
        asked = {name: x for name, x in given.items() if (name, x) != ("dataset", "auto")}
        runs.require_same(path, dataclasses.asdict(config), asked)
        if data_dir is not None and config.dataset == "digits":
            raise RunError(
                f"{path}: the run in it is on digits; leave out --data-dir, which is for MNIST"
            )
        dataset = datasets.load(config.dataset, data_dir)
        dataset = dataclasses.replace(dataset, notice=recorded["notice"])
    if config.z_loss and config.loss in SIGMOID_LOSSES:
        raise typer.BadParameter(f"--z-loss belongs to the softmax losses, not to {config.loss}")
    if dataset.notice:
        show.warn(console, dataset.notice, dataset.reason)
    task = dataset.parity() if config.loss == "even-odd" else dataset
    objective = make_objective(config.loss, task, config.label_smoothing, config.z_loss)
    group.require_agreement(
        {
            "options": dataclasses.asdict(config),
            "--out": str(path.absolute()),
            "data": dataset.checksum,
            "run in --out": recorded,
        }
    )
    trainer = Trainer(task, objective, config)
    if recorded is None and group.is_first():
        runs.create(
            path,
            {
                "experiment": "mnist",
                "options": dataclasses.asdict(config),
                "notice": dataset.notice,
                "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)},
                "devices": trainer.devices,
            },
        )
    header = {"dataset": dataset.name, "notice": dataset.notice, "loss": config.loss}
    with runs.RunFolder(path, header) as folder:
        show.setting(
            console,
            {
                "data": dataset.summary,
                "devices": trainer.devices,
                "model": f"MLP {'-'.join(map(str, trainer.widths))}, "
                f"{trainer.parameters:,} parameters, float32",
                "loss": objective.description,
                "options": ", ".join(
                    f"{name} {value}" for name, value in dataclasses.asdict(config).items()
                ),
                "folder": str(folder.path),
            },
        )
        if folder.epochs_done:
            console.print(f"resuming after epoch {folder.epochs_done} of {config.epochs}")
        elif resume:
            console.print("nothing to resume yet, starting at the first epoch")
        compile_start = time.perf_counter()
        trainer.compile()
        compile_seconds = time.perf_counter() - compile_start
        with show.EpochProgress(console, config.epochs, folder.history) as progress:
            evaluation = fit(trainer, folder, progress.advance)
        training_seconds = sum(row["seconds"] for row in folder.history)
        title = f"{config.loss} loss on {dataset.name}, {config.epochs} epochs, seed {config.seed}"
        show.result(console, title, evaluation)
        console.print(
            f"trained for {training_seconds:.1f} s, after {compile_seconds:.1f} s of compiling"
        )
        folder.record_final(
            {
                **evaluation.summary,
                "training_seconds": training_seconds,
                "notice": dataset.notice,
                "per_class": evaluation.per_class,
            }
        )
        if group.is_first():
            plots.save_all(
                path / "plots",
                title,
                dataset.notice,
                folder.history,
                evaluation,
                dataset.test_images,
            )
        show.files(console, folder.path)
        group.wait_for_all("the run is finished")


def new_config(given: dict[str, Any], dataset: str) -> Config:
    """The configuration of a new run: what was asked for, over the defaults of the data set."""
    defaults = {
        "loss": "softmax",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "epochs": DEFAULT_EPOCHS[dataset],
        "batch_size": DEFAULT_BATCH_SIZE[dataset],
        "learning_rate": DEFAULT_LEARNING_RATE[dataset],
        "weight_decay": 0.3,
        "dropout": 0.2,
        "seed": 0,
    }
    return Config(**{**defaults, **given, "dataset": dataset})


def recorded_config(path: Path, recorded: dict[str, Any]) -> Config:
    """The configuration that a run folder recorded."""
    names = {field.name for field in dataclasses.fields(Config)}
    options = recorded.get("options")
    if "notice" not in recorded or not isinstance(options, dict) or options.keys() != names:
        raise RunError(f"{path / runs.CONFIG_FILE}: not the configuration of this script")
    return Config(**options)


def check_options(given: dict[str, Any]) -> None:
    """Refuses values that the option types let through."""
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise typer.BadParameter(f"--{name.replace('_', '-')} has to be finite, not {value}")
    if given.get("learning_rate", 1.0) <= 0:
        raise typer.BadParameter(
            f"--learning-rate has to be positive, not {given['learning_rate']}"
        )
    if given.get("dropout", 0.0) == 1:
        raise typer.BadParameter("--dropout 1 would leave nothing to train")


if __name__ == "__main__":
    app()
