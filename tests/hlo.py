"""Reads compiled programs: which collectives they hold, how large, and what is inside loops."""

import re
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s64": 8}


class Collective(NamedTuple):
    """One collective: `bytes` is what its larger side holds on a device, the whole of a gather.

    `largest` is the number of elements of the largest array among what it takes and gives.
    """

    kind: str
    bytes: int
    largest: int
    in_loop: bool


def collectives(compiled):
    """All collectives of a compiled program."""
    computations = _computations(compiled.as_text())
    in_loops = _reached_from_loops(computations)
    return [
        _collective(lines, *found, name in in_loops)
        for name, lines in computations.items()
        for line in lines
        for found in re.findall(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*?)\)", line)
    ]


def has_loop(compiled):
    return bool(re.search(r" while\(", compiled.as_text()))


def _collective(lines, results, kind, operands, in_loop):
    names = re.findall(r"%([\w.\-]+)", operands)
    defined = [
        re.search(rf"%{re.escape(name)} = (.*?) [\w\-]+\(", "\n".join(lines)) for name in names
    ]
    sides = [_sizes(results), _sizes(" ".join(match[1] for match in defined))]
    return Collective(
        kind,
        max(sum(width * count for width, count in side) for side in sides),
        max(count for side in sides for _, count in side),
        in_loop,
    )


def _sizes(shapes):
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return [(WIDTHS[dtype], _product(dimensions)) for dtype, dimensions in found]


def _product(dimensions):
    size = 1
    for n in dimensions.split(","):
        size *= int(n or 1)
    return size


def _computations(text):
    """The lines of each computation, by its name."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[1], [])
        elif current is not None:
            current.append(line)
    return found


def _reached_from_loops(computations):
    """Names of the computations that some loop runs, directly or not."""
    text = {name: "\n".join(lines) for name, lines in computations.items()}
    waiting = re.findall(r"(?:body|condition)=%?([\w.\-]+)", "\n".join(text.values()))
    reached = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(computations.keys() & set(re.findall(r"%([\w.\-]+)", text[name])))
    return reached
