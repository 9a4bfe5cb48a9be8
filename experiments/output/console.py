"""What a person sees of a run: its setting, its progress and its result."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from experiments.output.report import Evaluation


def warn(console: Console, notice: str, reason: str = "") -> None:
    """Shows a notice that nobody should overlook."""
    text = Text.assemble((notice, "bold"), f"\n{reason}" if reason else "", overflow="fold")
    console.print(Panel(text, title="NOTICE", border_style="bold red"))


def setting(console: Console, rows: Mapping[str, str]) -> None:
    """Shows names and values, one pair per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    console.print(table)


class EpochProgress:
    """A progress bar over epochs with loss and accuracy, and a line for each finished epoch.

    Args:
      console: where it is shown.
      epochs: how many there are.
      history: the metrics of the epochs that are done already.
    """

    def __init__(self, console: Console, epochs: int, history: Sequence[Mapping[str, Any]]):
        self._bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(
            "", total=epochs, completed=len(history), figures=_figures(history[-1:])
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, row: Mapping[str, Any]) -> None:
        """Shows the metrics of one more epoch."""
        self._bar.console.print(
            f"epoch {row['epoch']:3d}: "
            f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
            f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}; "
            f"{row['seconds']:.2f} s",
            soft_wrap=True,
        )
        self._bar.update(self._task, advance=1, figures=_figures([row]))


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}" for row in rows
    )


def _figure(value: float, form: str) -> str:
    """The figure, or a dash where there is none: no image of a class, or none taken for one."""
    return "-" if math.isnan(value) else format(value, form)


def files(console: Console, folder: Path) -> None:
    """Says where the files of the run are, unwrapped so that the path can be copied."""
    text = Text(f"configuration, metrics, events, checkpoints and plots: {folder}")
    console.print(text, soft_wrap=True)


def result(console: Console, title: str, evaluation: Evaluation) -> None:
    """Shows the result by class and in all."""
    table = Table(title=title)
    table.add_column("class")
    for heading in ("images", "precision", "recall", "F1", "mean -log p"):
        table.add_column(heading, justify="right")
    for row in evaluation.per_class:
        table.add_row(
            row["class"],
            str(row["examples"]),
            *(_figure(row[key], ".2%") for key in ("precision", "recall", "f1")),
            _figure(row["nll"], ".4f"),
        )
    summary = evaluation.summary
    table.add_section()
    table.add_row("all", str(len(evaluation.labels)), "", "", "", f"{summary['test_nll']:.4f}")
    console.print(table)
    console.print(
        f"[bold]test accuracy {summary['test_accuracy']:.2%}[/bold], "
        f"loss {summary['test_loss']:.4f}, "
        f"expected calibration error {summary['calibration_error']:.4f}"
    )
