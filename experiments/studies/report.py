"""Figures of many runs: means and spreads, tables, and the files of a study."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as ConsoleTable

from experiments.output.files import write_whole

CSV_FILE, JSON_FILE, TABLE_FILE = "results.csv", "results.json", "table.md"


class Record(NamedTuple):
    """What one run achieves.

    Attributes:
      conditions: what tells it from the others, but for the seed.
      seed: its seed.
      figures: the results, by name.
    """

    conditions: dict[str, str | float]
    seed: int
    figures: dict[str, float]


class Column(NamedTuple):
    """How a figure is shown.

    Attributes:
      key: its name in a record.
      heading: its name for people, with the unit.
      digits: after the decimal point.
      scale: what to multiply it by, 100 for per cent.
    """

    key: str
    heading: str
    digits: int = 2
    scale: float = 100.0


@dataclass(frozen=True)
class Table:
    """Texts to be shown and saved alike; the first column names the rows."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headings, ("---",) * len(self.headings), *self.rows]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def show(self, console: Console) -> None:
        """Prints it, without cutting anything off."""
        table = ConsoleTable(box=None, padding=(0, 1), pad_edge=False)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


@dataclass(frozen=True)
class Outcome:
    """What a study leaves behind.

    Attributes:
      records: one for each run and way to read it.
      table: their summary.
      figures: pictures, by the name of their file.
      about: what else has to be known to repeat it.
    """

    records: tuple[Record, ...]
    table: Table
    figures: dict[str, Figure]
    about: dict[str, Any]


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation of at least two values."""
    return float(np.std(values, ddof=1))


def cell(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Mean and spread as text, or the one value there is."""
    scaled = [value * scale for value in values]
    mean = f"{np.mean(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ± {spread(scaled):.{digits}f}"


def values_of(records: Sequence[Record], key: str, **conditions: str | float) -> list[float]:
    """A figure of all records that meet the conditions, in the order of the seeds."""
    found = [
        record
        for record in records
        if all(record.conditions[name] == value for name, value in conditions.items())
    ]
    return [record.figures[key] for record in sorted(found, key=lambda record: record.seed)]


def by_method(records: Sequence[Record], columns: Sequence[Column]) -> Table:
    """One row for each method, in the order of appearance, one column for each figure."""
    methods = list(dict.fromkeys(str(record.conditions["method"]) for record in records))
    return Table(
        ("method", *(column.heading for column in columns)),
        tuple(
            (
                method,
                *(
                    cell(values_of(records, c.key, method=method), c.digits, c.scale)
                    for c in columns
                ),
            )
            for method in methods
        ),
    )


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean and spread of every figure over the seeds, for each set of conditions."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.conditions.items()), []).append(record)
    return [
        {
            **dict(conditions),
            **{
                key: {
                    "mean": float(np.mean([record.figures[key] for record in group])),
                    "spread": spread([record.figures[key] for record in group])
                    if len(group) > 1
                    else None,
                }
                for key in group[0].figures
            },
        }
        for conditions, group in groups.items()
    ]


def save(folder: Path, outcome: Outcome, about: Mapping[str, Any], title: str) -> None:
    """Writes everything but the pictures."""
    first = outcome.records[0]
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow([*first.conditions, "seed", *first.figures])
    for record in outcome.records:
        writer.writerow([*record.conditions.values(), record.seed, *record.figures.values()])
    write_whole(folder / CSV_FILE, lines.getvalue())
    content = {**about, **outcome.about, "results": summary(outcome.records)}
    write_whole(folder / JSON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    notice = f"**{about['notice']}**\n\n" if about["notice"] else ""
    write_whole(folder / TABLE_FILE, f"{title}\n\n{notice}{outcome.table.markdown()}")
