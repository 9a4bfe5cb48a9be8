"""Measures the losses of `ce_jax` beside those of other libraries: time, memory, scaling.

    python -m experiments.benchmark

It takes long, and needs a machine that has nothing else to do: tables and pictures say where that
was not so, and where `--quick` took fewer shapes. All peers
are called in turns in this one process, after a warm-up, and each call waits for its result; ratios
are taken within a turn, so that they stay right where the machine's speed drifts.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.benchmarking import (
    epoch,
    jax_peers,
    pictures,
    problems,
    report,
    sharded,
    startup,
    torch_peers,
)
from experiments.benchmarking.allocator import keep_freed_memory
from experiments.benchmarking.contention import Contention
from experiments.benchmarking.measure import OURS, Row, measure
from experiments.benchmarking.programs import Peer
from experiments.benchmarking.timing import Effort
from experiments.output import console as show
from experiments.output import files
from experiments.output.errors import ExperimentError, reported
from experiments.output.machine import machine


class Operation(StrEnum):
    """What `--only` selects."""

    INTEGER = "integer"
    ONE_HOT = "one-hot"
    UNLIKELY = "unlikely"
    IGNORED = "ignored"
    WEIGHTED = "weighted"
    SMOOTHED = "smoothed"
    SIGMOID = "sigmoid"
    STATISTICS = "statistics"
    LINEAR = "linear"
    MASKED = "masked"
    MIXED = "mixed"
    VOCAB_PARALLEL = "vocab-parallel"
    EPOCH = "epoch"
    EAGER = "eager"
    IMPORT = "import"
    COMPILE = "compile"
    SCALING = "scaling"


# Bytes that malloc gets before the first call.
_HEAP, _QUICK_HEAP = 3 << 30, 1 << 28

# A part of the work, and what it is called while it runs.
Part = tuple[str, Callable[[], list[Row]]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[
        list[Operation] | None,
        typer.Option(
            help="Measure this operation alone. May be given several times.", show_default="all"
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Measure few and small shapes with few samples, to see the benchmark run.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Seconds for which each problem is measured, and as many again for the loss "
            "without its gradient.",
            show_default="3; with --quick 0.15",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out this peer, torch.compile for example. May be given several times."
        ),
    ] = None,
    fresh_memory: Annotated[
        bool,
        typer.Option(
            "--fresh-memory",
            help="Leave malloc as it is. It then asks the kernel for the memory of large arrays "
            "in each call again.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables and pictures. It has to be new or empty.",
            show_default="runs/benchmark-DATE-TIME",
        ),
    ] = None,
) -> None:
    """Measure the losses of ce_jax and of other libraries.

    Exit status: 0 for a finished run, 1 for a run folder that cannot be used, 2 for wrong options,
    130 for an interrupt.
    """
    folder = files.folder_of(out, "benchmark", datetime.now())
    # Or JAX would take most of a GPU's memory, and leave torch the rest.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A compiled program found on disk would make compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    default = Effort(0.15, 3, 15) if quick else Effort(3.0)
    effort = default if seconds is None else default._replace(seconds=seconds)
    kept = not fresh_memory and keep_freed_memory(_QUICK_HEAP if quick else _HEAP)
    cure = f"What was measured until then is in {folder}; another --out starts anew."
    with reported(folder, cure):
        run(only or list(Operation), effort, folder, quick=quick, without=without or (), kept=kept)


def run(
    operations: Sequence[str],
    effort: Effort,
    folder: Path,
    *,
    quick: bool,
    without: Sequence[str] = (),
    kept: bool = False,
) -> None:
    """Measures, and leaves figures and pictures in a folder after every part of the work.

    Args:
      operations: values of `Operation`.
      effort: how long to sample each problem.
      folder: where results go; new or empty.
      quick: whether small shapes do.
      without: names of peers to leave out.
      kept: whether malloc keeps freed memory, to be noted.

    Raises:
      ExperimentError: there is no such peer, or the folder cannot be used.
    """
    peers = _peers(without, quick=quick)
    console = Console()
    console.width = max(console.width, 120)  # where it is not a terminal, a table needs as much
    options = {
        "operations": list(operations),
        "quick": quick,
        "without": list(without),
        "freed memory": "kept" if kept else "left to malloc",
        **effort._asdict(),
    }
    contention = Contention()
    about: dict[str, Any] = {"options": options, **machine(), "others": None}
    files.claim(folder)
    config = {"experiment": "benchmark", **about}
    files.write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    show.setting(
        console,
        {
            "processor": f"{about['processor']}, {about['cores']} cores, load {about['load']}",
            "devices": ", ".join(map(str, about["devices"])),
            "freed memory": options["freed memory"],
            "folder": str(folder.absolute()),
        },
    )
    for notice in report.notices(about):
        show.warn(console, notice)
    rows: list[Row] = []
    for name, part in parts(operations, effort, peers, quick=quick, kept=kept):
        console.print(f"[bold]{escape(name)}[/bold]", soft_wrap=True)
        found = part()
        print_rows(console, found)
        rows += found
        others = contention.cores()
        about["others"] = None if others is None else round(others, 2)
        report.save(folder, rows, about)
    device = f"{about['processor']}, {about['cores']} cores"
    if jax.default_backend() != "cpu":
        device = ", ".join(about["devices"])
    title = f"{device}, jax {jax.__version__}"
    notices = report.notices(about)
    pictures.save_all(folder, rows, title, notices)
    for row in report.slower(rows):
        problem = row.problem
        console.print(
            f"slower than optax in three of four rounds: {problem.operation} {problem.shape} "
            f"{problem.dtype}, devices {row.devices}: {report.ratio(row.to_optax)}",
            soft_wrap=True,
        )
    for notice in notices:
        show.warn(console, notice)
    console.print(f"results, tables and pictures: {folder.absolute()}", soft_wrap=True)


def _peers(without: Sequence[str], *, quick: bool) -> list[Peer]:
    peers = jax_peers.peers() + torch_peers.peers(compiled=not quick)
    names = [peer.name for peer in peers]
    for name in without:
        if name not in names or name == OURS:
            raise ExperimentError(f"no peer to leave out is called {name!r}: {', '.join(names)}")
    return [
        peer._replace(missing=peer.missing or "left out by --without")
        if peer.name in without
        else peer
        for peer in peers
    ]


def parts(
    operations: Sequence[str], effort: Effort, peers: Sequence[Peer], *, quick: bool, kept: bool
) -> Iterator[Part]:
    """The parts of the work, in the order in which they are done."""
    if Operation.IMPORT in operations:
        yield "import", lambda: startup.import_rows(peers, 3 if quick else 11)
    if Operation.COMPILE in operations:
        # In float32 the mixed form is the linear one.
        losses = [o for o in problems.ARGUMENTS if o != problems.MIXED]
        names = [o for o in operations if o in losses] or losses
        names = names[:1] if quick else names
        yield "compile", lambda: startup.compile_rows(peers, names, 3 if quick else 7)
    on_accelerator = jax.default_backend() != "cpu"
    for problem in problems.table(operations, quick, on_accelerator=on_accelerator):
        yield (
            f"{problem.operation} {problem.shape} {problem.dtype}",
            partial(measure, problem, peers, effort),
        )
    if Operation.EPOCH in operations:
        yield "epoch", lambda: epoch.rows(effort, peers, quick=quick)
    if Operation.VOCAB_PARALLEL in operations:
        yield Operation.VOCAB_PARALLEL, lambda: sharded.rows(effort, peers, quick=quick, kept=kept)
    # Compiling for each of many sizes would take longer than all the rest.
    curves = [peer for peer in peers if peer.name != "torch.compile"]
    for problem in problems.scaling(quick) if Operation.SCALING in operations else ():
        yield (
            f"scaling {problem.group}: {problem.operation} {problem.shape}",
            partial(measure, problem, curves, effort),
        )


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Shows one line for each peer."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("peer", no_wrap=True)
    for heading in ("forward", "gradient", "quartiles", "temporaries", "/ optax", "/ limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    several = len({row.problem for row in rows}) > 1
    for row in rows:
        on = f", {row.devices} devices" if row.devices > 1 else ""
        what = f"{row.problem.operation} {row.problem.shape}: " if several else ""
        peer = escape(what + row.peer) + on
        if row.gradient is None:
            console.print(f"  {peer}: {escape(row.status)}", style="dim", soft_wrap=True)
        else:
            style = "bold" if row.peer == OURS else None
            table.add_row(peer, *report.cells(row), style=style)
    console.print(table)


if __name__ == "__main__":
    app()
