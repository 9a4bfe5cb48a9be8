"""From problems and peers to rows of figures."""

import gc
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from experiments.benchmarking.problems import Problem
from experiments.benchmarking.programs import Peer, Program, kind_of_device, limit, on_device
from experiments.benchmarking.timing import Effort, Samples, interleave

OURS, BASELINE, LIMIT = "ce_jax", "optax", "limit"
MEASURED = "measured"


class Row(NamedTuple):
    """What one peer did with one problem.

    Attributes:
      problem: the problem.
      peer: who.
      status: `MEASURED`, or why there are no figures.
      device: where.
      devices: on how many.
      forward: seconds for the loss.
      gradient: seconds for loss and gradient; for the whole, where there is nothing to derive.
      temporaries: bytes held at once beside inputs and results, for loss and gradient.
      to_optax: `gradient` over that of optax, by rounds of the same interleaved measurement.
      to_limit: `gradient` over the limit of the device, likewise.
    """

    problem: Problem
    peer: str
    status: str = MEASURED
    device: str = ""
    devices: int = 1
    forward: Samples | None = None
    gradient: Samples | None = None
    temporaries: int | None = None
    to_optax: Samples | None = None
    to_limit: Samples | None = None

    def record(self) -> dict[str, Any]:
        """The row as flat columns: seconds and bytes, None for what there is not."""
        columns: dict[str, Any] = {
            **self.problem._asdict(),
            "devices": self.devices,
            "device": self.device,
            "peer": self.peer,
            "status": self.status,
        }
        for name in ("forward", "gradient", "to_optax", "to_limit"):
            samples: Samples | None = getattr(self, name)
            for column in ("median", "lower", "upper", "samples"):
                columns[f"{name}_{column}"] = None if samples is None else getattr(samples, column)
        return {**columns, "temporaries": self.temporaries}


def measure(problem: Problem, peers: Iterable[Peer], effort: Effort) -> list[Row]:
    """One row for every peer that has the operation, and one for the limit of the device.

    A peer that fails is a row that says why, as is one that is missing; `ce_jax` must not fail.
    """
    inputs = on_device(problem)
    floor, times = limit(problem, inputs)
    floor()

    def build(peer: Peer) -> Program:
        return peer.build(problem, inputs)

    rows, programs = prepare(problem, peers, build)
    rows += compare(problem, programs, effort, {LIMIT: (floor, times)})
    programs.clear()
    gc.collect()
    return rows


def present(
    problem: Problem, peers: Iterable[Peer], names: Collection[str]
) -> tuple[list[Row], list[str]]:
    """Of the peers of these names, rows for those that are missing, and the names of the others."""
    named = [peer for peer in peers if peer.name in names]
    rows = [Row(problem, peer.name, peer.missing) for peer in named if peer.missing]
    return rows, [peer.name for peer in named if not peer.missing]


def prepare(
    problem: Problem, peers: Iterable[Peer], build: Callable[[Peer], Program]
) -> tuple[list[Row], dict[str, Program]]:
    """Builds and warms up the programs; those that cannot be are rows already."""
    rows, programs = [], {}
    for peer in peers:
        if problem.formula not in peer.operations:
            continue
        if peer.missing:
            rows.append(Row(problem, peer.name, peer.missing))
            continue
        try:
            program = build(peer)
            for call in (program.forward, program.gradient):
                if call is not None:
                    call()
        except Exception as error:  # Whatever goes wrong in a foreign library is its result.
            if peer.name == OURS:
                raise
            rows.append(Row(problem, peer.name, f"failed: {_brief(error)}"))
        else:
            programs[peer.name] = program
    return rows, programs


def compare(
    problem: Problem,
    programs: Mapping[str, Program],
    effort: Effort,
    limits: Mapping[str, tuple[Callable[[], object], float]] | None = None,
    devices: int = 1,
) -> list[Row]:
    """Times programs that are warm, all in turns.

    Args:
      problem: what they solve.
      programs: by the name of the peer.
      effort: how long to measure.
      limits: further calls, timed like a gradient and multiplied by a number.
      devices: how many they run on.
    """
    limits = limits or {}
    gradients = interleave(
        {
            **{name: program.gradient for name, program in programs.items()},
            **{name: call for name, (call, _) in limits.items()},
        },
        effort,
    )
    for name, (_, times) in limits.items():
        gradients[name] = gradients[name].scaled(times)
    forwards = interleave(
        {name: p.forward for name, p in programs.items() if p.forward is not None}, effort
    )
    rows = []
    for name, gradient in gradients.items():
        program = programs.get(name)
        rows.append(
            Row(
                problem,
                name,
                device=kind_of_device() if program is None else program.device,
                devices=devices,
                forward=forwards.get(name),
                gradient=gradient,
                temporaries=None if program is None else program.temporaries(),
                to_optax=ratio(gradient, gradients.get(BASELINE)),
                to_limit=ratio(gradient, gradients.get(LIMIT)),
            )
        )
    return rows


def ratio(time: Samples, other: Samples | None) -> Samples | None:
    """By rounds; None where there is nothing to compare with."""
    return None if other is None else time.over(other)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
