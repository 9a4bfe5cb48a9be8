"""Rows of figures as CSV, JSON and Markdown, with all that is needed to understand them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarking.measure import BASELINE, LIMIT, MEASURED, OURS, Row
from experiments.benchmarking.timing import Samples
from experiments.output.files import write_whole

CSV_FILE, JSON_FILE = "results.csv", "results.json"
SUMMARY_FILE, TABLE_FILE = "summary.md", "table.md"

# What may be before the ratios are doubtful: the load average when a run begins, of which the one
# thread of this process may be the cause, and the share of the cores that others use during it.
MOST_LOAD, MOST_OTHERS = 1.0, 0.1


def notices(about: Mapping[str, Any]) -> list[str]:
    """What every table and picture has to say, one sentence each; empty after a run to trust.

    Args:
      about: `options`, `cores`, the `load` when the run began, and how many cores `others` used;
        None for either where nothing tells that.
    """
    found = []
    if about["options"]["quick"]:
        found.append("QUICK RUN: small shapes and few samples, not for conclusions")
    if about["load"] is not None and about["load"] > MOST_LOAD:
        found.append(
            f"BUSY MACHINE: load {about['load']} when the run began; do not trust the ratios"
        )
    others = about["others"]
    if others is not None and others > MOST_OTHERS * about["cores"]:
        found.append(
            f"BUSY MACHINE: other programs used {others} of {about['cores']} cores during the run; "
            "do not trust the ratios"
        )
    return found


def save(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes all rows in every form."""
    said = notices(about)
    records = [{**row.record(), "notice": "; ".join(said)} for row in rows]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    write_whole(folder / CSV_FILE, lines.getvalue())
    content = {**about, "notices": said, "rows": [row.record() for row in rows]}
    write_whole(folder / JSON_FILE, json.dumps(content, indent=1) + "\n")
    table = [row for row in rows if row.problem.group == "table"]
    if table:
        heading = "".join(f"**{text}**\n\n" for text in said) + f"{_about(about)}\n\n"
        write_whole(folder / SUMMARY_FILE, heading + summary(table))
        write_whole(folder / TABLE_FILE, heading + full_table(rows))


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table of `ce_jax` against the others, one line for each problem."""
    shown = [name for name in dict.fromkeys(row.peer for row in rows) if name not in (OURS, LIMIT)]
    absent = {name: _absence(rows, name) for name in shown}
    shown = [name for name in shown if not absent[name]]
    heading = ["value and gradient", "shape", "dtype", "ce_jax"]
    heading += [f"/ {name}" for name in shown]
    heading += ["/ limit", "temporaries", "optax's"]
    lines = []
    for problem, devices in dict.fromkeys((row.problem, row.devices) for row in rows):
        found = {r.peer: r for r in rows if (r.problem, r.devices) == (problem, devices)}
        ours = found.get(OURS)
        if ours is None or ours.gradient is None:
            continue
        optax = found.get(BASELINE)
        on = f", {devices} devices" if devices > 1 else ""
        lines.append(
            [
                problem.operation + on,
                problem.shape if problem.rows else "-",
                problem.dtype if problem.rows else "-",
                _time(ours.gradient),
                *(_over(ours, found.get(name)) for name in (*shown, LIMIT)),
                _bytes(ours.temporaries),
                _bytes(None if optax is None else optax.temporaries),
            ]
        )
    text = _markdown(heading, lines, left=3)
    notes = [f"- {name}: {reason}" for name, reason in absent.items() if reason]
    return text + ("\nWithout figures:\n\n" + "\n".join(notes) + "\n" if notes else "")


def full_table(rows: Sequence[Row]) -> str:
    """A Markdown table of everything, one line for each peer and problem."""
    heading = ["operation", "shape", "dtype", "device", "peer", "forward", "value and gradient"]
    heading += ["quartiles", "temporaries", "/ optax", "/ limit"]
    lines = []
    for row in rows:
        problem, on = row.problem, f"{row.devices} x " if row.devices > 1 else ""
        name = [problem.operation, problem.shape, problem.dtype, on + row.device, row.peer]
        lines.append([*name, *cells(row)])
    return _markdown(heading, lines, left=5)


def cells(row: Row) -> list[str]:
    """Forward, gradient, its quartiles, temporaries, ratios; or the status in place of them."""
    gradient = row.gradient
    if gradient is None:
        return [row.status, *[""] * 5]
    return [
        "" if row.forward is None else _time(row.forward),
        _time(gradient),
        f"{_seconds(gradient.lower)} - {_seconds(gradient.upper)}",
        _bytes(row.temporaries),
        ratio(row.to_optax),
        ratio(row.to_limit),
    ]


def slower(rows: Sequence[Row]) -> list[Row]:
    """The rows of `ce_jax` that took longer than optax's in three of four rounds or more."""
    ours = (row for row in rows if row.peer == OURS)
    return [row for row in ours if row.to_optax is not None and row.to_optax.lower > 1]


def _absence(rows: Sequence[Row], name: str) -> str:
    """Why a peer has no figures at all; "" if it has some."""
    statuses = [row.status for row in rows if row.peer == name]
    return "" if MEASURED in statuses else statuses[0]


def _markdown(heading: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(heading) - left)
    return "".join(f"| {' | '.join(line)} |\n" for line in (heading, rule, *lines))


def _over(ours: Row, other: Row | None) -> str:
    if other is None or ours.gradient is None:
        return "-"
    if other.gradient is None:
        return "failed" if other.status.startswith("failed") else "-"
    return ratio(ours.gradient.over(other.gradient))


def ratio(samples: Samples | None) -> str:
    """A ratio as the tables show it."""
    return "-" if samples is None else f"{samples.median:.2f}"


def _time(seconds: Samples) -> str:
    return _seconds(seconds.median)


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def _about(about: Mapping[str, Any]) -> str:
    """The machine and the versions in one sentence."""
    versions = [f"{name} {version}" for name, version in about["versions"].items() if version]
    devices = ", ".join(sorted(set(about["devices"])))
    return (
        f"{about['date'][:10]}, {about['processor']}, {about['cores']} cores, JAX devices: "
        f"{devices}; Python {about['python']}, {', '.join(versions)}. Medians of interleaved calls "
        f"in one process; memory that they free: {about['options']['freed memory']}. `/ x`: time "
        "over that of x, the median of the rounds' ratios; limit: one read and one write of the "
        "logits, or three matmuls, measured in turns with the rest."
    )
