"""The command line of a study: its options, its data, its folder, and errors of one line."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import flax
import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from experiments.data import datasets
from experiments.output import console as show
from experiments.output import files
from experiments.output.errors import RunError, reported
from experiments.output.figures import save_figures
from experiments.output.machine import machine
from experiments.studies import report
from experiments.studies.training import HIDDEN, Loss, Runs, Trained, train
from experiments.training.loop import Recipe

QUICK = "QUICK: too little training for figures that mean anything"
_QUICK_IMAGES, _QUICK_EPOCHS = 500, 2
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Budget:
    """What every run of a study may use, whatever its method.

    Attributes:
      images: training images; a study may have its own meaning for that.
      epochs: passes over them.
      batch_size: images per step.
    """

    images: int
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Study:
    """What a study works with.

    Attributes:
      data: the data set.
      images: the training images it may use.
      recipe: how every run is trained.
      seeds: 0 up to the number of seeds.
      console: where progress is shown.
    """

    data: datasets.Dataset
    images: int
    recipe: Recipe
    seeds: range
    console: Console

    def subset(self, seed: int, available: int) -> np.ndarray:
        """Numbers of the images that a seed trains on, drawn from the first ones available."""
        draw = np.random.default_rng([seed, 0])
        return draw.permutation(available)[: self.images].astype(np.int32)

    def train(
        self,
        losses: Mapping[str, Loss],
        runs: Runs,
        judged: np.ndarray,
        *,
        images: np.ndarray | None = None,
        outputs: int | None = None,
        learnt_rate: float = 0.0,
    ) -> Trained:
        """Trains all runs behind a progress bar; see `training.train`."""
        steps = runs.rows.shape[1] // self.recipe.batch_size
        if steps == 0:
            raise RunError(
                f"{runs.rows.shape[1]} training images do not fill a batch of "
                f"{self.recipe.batch_size}"
            )
        self.console.print(
            f"training {len(runs.seed)} runs of {self.recipe.epochs} x {steps} steps in one "
            "compiled program",
            soft_wrap=True,
        )
        with Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("mean loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
        ) as bar:
            task = bar.add_task("", total=self.recipe.epochs, loss="")
            return train(
                tuple(losses.values()),
                self.recipe,
                self.data.train_images if images is None else images,
                runs,
                judged,
                outputs=len(self.data.class_names) if outputs is None else outputs,
                learnt_rate=learnt_rate,
                on_epoch=lambda loss: bar.update(task, advance=1, loss=f"{loss:.4g}"),
            )


def make_app(
    name: str, purpose: str, body: Callable[[Study], report.Outcome], budgets: Mapping[str, Budget]
) -> typer.Typer:
    """The command of a study, which ends with one line where it cannot go on.

    Args:
      name: of the study.
      purpose: one line for --help.
      body: does the work.
      budgets: by data set.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    epochs_of = {dataset: budget.epochs for dataset, budget in budgets.items()}
    results = "Exit status: 0 for a finished study, 1 for data or a folder that cannot be used, "

    @app.command(help=f"{purpose}\n\n{results}2 for wrong options, 130 for an interrupt.")
    def main(
        seeds: Annotated[
            int | None,
            typer.Option(
                min=1,
                max=100,
                help="Number of seeds. Each has its own initial parameters, images and noise.",
                show_default="3; with --quick 1",
            ),
        ] = None,
        epochs: Annotated[
            int | None,
            typer.Option(
                min=1,
                max=1000,
                help="Passes over the training images.",
                show_default=f"{epochs_of['mnist']}; on digits {epochs_of['digits']}; "
                f"with --quick {_QUICK_EPOCHS}",
            ),
        ] = None,
        dataset: Annotated[
            datasets.DatasetName,
            typer.Option(
                help="What to train on. mnist: MNIST, or an error where there is none. digits: "
                "scikit-learn's 8x8 digits. auto: MNIST where it is at hand or can be downloaded, "
                "otherwise the digits."
            ),
        ] = "auto",
        data_dir: Annotated[
            Path | None,
            typer.Option(
                help="Folder of the four MNIST files, plain or .gz. Without one they are "
                "downloaded into your cache folder, once.",
                show_default=f"${datasets.DATA_DIR_VARIABLE} where it is set",
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(
                help="Folder for tables, plots and figures of all runs. It has to be new or empty.",
                show_default=f"runs/{name}-DATE-TIME",
            ),
        ] = None,
        quick: Annotated[
            bool,
            typer.Option(
                "--quick", help="Take few images and epochs, to see the study run in seconds."
            ),
        ] = False,
    ) -> None:
        if data_dir is not None and dataset == "digits":
            raise typer.BadParameter("--data-dir is for MNIST: leave it out with --dataset digits")
        with results_in(name, out) as folder:
            found = datasets.load(dataset, data_dir)
            files.claim(folder)
            budget = budgets[found.name]
            recipe = Recipe(
                epochs=epochs or (_QUICK_EPOCHS if quick else budget.epochs),
                batch_size=budget.batch_size,
                learning_rate=_LEARNING_RATE,
                weight_decay=0.0,
            )
            images = min(budget.images, _QUICK_IMAGES) if quick else budget.images
            notice = "; ".join(text for text in (found.notice, QUICK if quick else "") if text)
            console = open_console(notice, found.reason)
            study = Study(found, images, recipe, range(seeds or (1 if quick else 3)), console)
            _conduct(name, body, study, folder, notice)

    return app


def _conduct(
    name: str, body: Callable[[Study], report.Outcome], study: Study, folder: Path, notice: str
) -> None:
    found, recipe = study.data, study.recipe
    widths = "-".join(map(str, (found.features, *HIDDEN)))
    training = (
        f"Adam, learning rate {recipe.learning_rate:g} at its peak, cosine decay, batches of "
        f"{recipe.batch_size}, {recipe.epochs} epochs; no weight decay, no dropout"
    )
    show.setting(
        study.console,
        {
            "data": found.summary,
            "model": f"MLP {widths} and one layer more, float32",
            "training": training,
            "seeds": str(len(study.seeds)),
            "devices": ", ".join(device.device_kind for device in jax.devices()),
            "folder": str(folder.absolute()),
        },
    )
    about = {
        "experiment": name,
        "notice": notice,
        "data": found.summary,
        "options": {**asdict(recipe), "seeds": len(study.seeds), "images": study.images},
        "hidden": list(HIDDEN),
    }
    title = f"{name} on {found.name}, {recipe.epochs} epochs"
    finish(lambda: body(study), title, about, folder, study.console)


@contextlib.contextmanager
def results_in(name: str, out: Path | None) -> Iterator[Path]:
    """Gives the folder of a study, and ends the program with one line where it cannot go on."""
    folder = files.folder_of(out, name, datetime.now())
    with reported(folder, "A study writes its results at its end: start it with another --out."):
        yield folder


def open_console(notice: str, reason: str = "") -> Console:
    """Shows the notice, where there is one, and returns a console for the rest."""
    console = Console()
    if not console.is_terminal:
        console.width = 130  # what the widest table needs
    if notice:
        show.warn(console, notice, reason)
    return console


def finish(
    work: Callable[[], report.Outcome],
    title: str,
    about: Mapping[str, Any],
    folder: Path,
    console: Console,
) -> None:
    """Lets a study do its work, and shows and saves what comes of it.

    Args:
      work: does it.
      title: of table and pictures, but for the number of seeds.
      about: what results.json tells of the study: its "notice", its "options" with "seeds", ...
      folder: where the results go.
      console: where they are shown.
    """
    start, start_of_work = time.perf_counter(), time.process_time()
    outcome = work()
    seconds, processor = time.perf_counter() - start, time.process_time() - start_of_work
    seeds = about["options"]["seeds"]
    title = f"{title}, {seeds} seed{'s'[: seeds > 1]}"
    times = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}
    record = {**about, **times, **machine()}
    record["versions"]["flax"] = flax.__version__
    # Shown first: what took minutes to compute is not lost with a disk that is full.
    console.print(f"[bold]{title}[/bold]; mean ± standard deviation over the seeds")
    outcome.table.show(console)
    console.print(f"{seconds:.0f} s, {processor:.0f} s of processor time", highlight=False)
    report.save(folder, outcome, record, title)
    # The pictures of studies are wide, and their files should stay small.
    save_figures(folder, outcome.figures, title, about["notice"], dots_per_inch=110)
    console.print(
        Text(f"tables, plots and the figures of every run: {folder.absolute()}"), soft_wrap=True
    )
