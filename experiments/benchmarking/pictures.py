"""Pictures of the figures: ratios to optax, and curves of time and memory against size."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.benchmarking.measure import BASELINE, LIMIT, OURS, Row

_STYLES = {
    OURS: ("#b2182b", "o"),
    BASELINE: ("#2166ac", "s"),
    "jax.nn": ("#67a9cf", "v"),
    "torch": ("#e08214", "D"),
    "torch.compile": ("#fdb863", "d"),
    "torch chunked": ("#8c510a", "P"),
    "keras": ("#762a83", "X"),
    "tokamax": ("#1b7837", "^"),
    "tokamax chunked": ("#a6dba0", "^"),
    "liger": ("#7fbc41", "<"),
    "cut-cross-entropy": ("#c51b7d", ">"),
    "cut-cross-entropy exact": ("#f1b6da", ">"),
    LIMIT: ("#777777", ""),
}
_DOTS_PER_INCH = 130
_VARIED: dict[str, Callable[[Row], int]] = {
    "classes": lambda row: row.problem.classes,
    "rows": lambda row: row.problem.rows,
    "devices": lambda row: row.devices,
}


def save_all(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Draws what the rows have figures for and returns the paths."""
    figures: dict[str, Figure] = {}
    table = [row for row in rows if row.problem.group == "table" and row.to_optax is not None]
    shared = [row for row in table if row.problem.operation == "vocab-parallel"]
    table = [row for row in table if row not in shared]
    if table:
        figures["ratios"] = ratios(table)
    for varied in ("classes", "rows"):
        series = [row for row in rows if row.problem.group == varied]
        if series:
            figures[f"scaling_{varied}"] = scaling(series, varied)
    if len({row.devices for row in shared}) > 1:
        figures["scaling_devices"] = scaling(shared, "devices")
    paths = []
    for name, figure in figures.items():
        figure.suptitle(title, fontsize=10)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DOTS_PER_INCH)
        paths.append(path)
    return paths


def ratios(rows: Sequence[Row]) -> Figure:
    """Time of value and gradient over optax's, one line of points for each problem."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(problems)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=_STYLES[BASELINE][0], linewidth=1.2, label="optax = 1")
    for peer in _order(rows):
        if peer in (BASELINE, LIMIT):
            continue
        color, marker = _style(peer)
        found = [row for row in rows if row.peer == peer]
        axes.scatter(
            [row.to_optax.median for row in found if row.to_optax],
            [problems.index(row.problem) for row in found],
            color=color,
            marker=marker,
            s=46 if peer == OURS else 22,
            zorder=3 if peer == OURS else 2,
            label=peer,
        )
    last = ""
    for index, problem in enumerate(problems):
        if last and problem.operation != last:
            axes.axhline(index - 0.5, color="#cccccc", linewidth=0.8)
        last = problem.operation
    axes.set_yticks(
        range(len(problems)),
        [f"{p.operation}  {p.shape} {p.dtype}" if p.rows else p.operation for p in problems],
        fontsize=8,
    )
    axes.set_ylim(len(problems) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time of value and gradient, over that of optax (left is faster)")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    _clean(axes)
    return figure


def scaling(rows: Sequence[Row], varied: str) -> Figure:
    """Time and temporaries of value and gradient against one size, with all peers."""
    operations = list(dict.fromkeys(row.problem.operation for row in rows))
    figure = Figure(figsize=(9.5, 0.7 + 3.3 * len(operations)), layout="constrained")
    grid = figure.subplots(len(operations), 2, squeeze=False)
    for operation, (time_axes, memory_axes) in zip(operations, grid, strict=True):
        found = [row for row in rows if row.problem.operation == operation and row.gradient]
        for peer in _order(found):
            series = sorted((row for row in found if row.peer == peer), key=_VARIED[varied])
            _times(time_axes, series, peer, varied)
            sized = [row for row in series if row.temporaries is not None]
            if sized:
                color, marker = _style(peer)
                memory_axes.plot(
                    [_VARIED[varied](row) for row in sized],
                    [max(row.temporaries or 0, 100) for row in sized],
                    color=color,
                    marker=marker,
                    markersize=4,
                    label=peer,
                )
        time_axes.set_ylabel("value and gradient (ms)")
        memory_axes.set_ylabel("temporaries (MB)")
        sizes = sorted({_VARIED[varied](row) for row in found})
        for axes in (time_axes, memory_axes):
            _size_axis(axes, sizes, varied)
        for axes, unit in ((time_axes, 1e-3), (memory_axes, 1e6)):
            _amount_axis(axes, unit)
        time_axes.set_title(_title(found[0], varied), fontsize=10, loc="left")
    lines = {str(line.get_label()): line for time_axes, _ in grid for line in time_axes.get_lines()}
    figure.legend(
        lines.values(), lines.keys(), frameon=False, fontsize=9, ncols=6, loc="outside lower center"
    )
    return figure


def _times(axes: Axes, series: Sequence[Row], peer: str, varied: str) -> None:
    color, marker = _style(peer)
    sizes = [_VARIED[varied](row) for row in series]
    timings = [row.gradient for row in series if row.gradient]
    style = "--" if peer == LIMIT else "-"
    axes.plot(
        sizes,
        [t.median for t in timings],
        style,
        color=color,
        marker=marker,
        markersize=4,
        linewidth=1.8 if peer == OURS else 1.2,
        zorder=3 if peer == OURS else 2,
        label=peer,
    )
    lower, upper = [t.lower for t in timings], [t.upper for t in timings]
    axes.fill_between(sizes, lower, upper, color=color, alpha=0.15, linewidth=0)


def _size_axis(axes: Axes, sizes: Sequence[int], varied: str) -> None:
    axes.set_xscale("log", base=2)
    shown = sizes[:: 2 if len(sizes) > 7 else 1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
    )
    axes.set_xlabel(varied)
    _clean(axes)


def _amount_axis(axes: Axes, unit: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / unit:g}"))
    low, high = axes.get_ylim()
    minor = FuncFormatter(lambda y, _: f"{y / unit:g}" if high / low < 200 else "")
    axes.yaxis.set_minor_formatter(minor)
    axes.tick_params(which="minor", labelsize=8)


def _title(row: Row, varied: str) -> str:
    problem = row.problem
    fixed = {"rows": problem.rows, "classes": problem.classes, "features": problem.features}
    fixed.pop(varied, None)
    words = ", ".join(f"{size:,} {name}" for name, size in fixed.items() if size)
    return f"{problem.operation}, {words}, {problem.dtype}"


def _order(rows: Sequence[Row]) -> list[str]:
    present = {row.peer for row in rows if row.gradient}
    known = [peer for peer in _STYLES if peer in present]
    return known + sorted(present - set(known))


def _style(peer: str) -> tuple[str, str]:
    return _STYLES.get(peer, ("#000000", "*"))


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
