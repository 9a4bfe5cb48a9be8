"""Pictures of the figures: ratios to optax, and curves of time and memory against size."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.benchmarking.measure import BASELINE, LIMIT, OURS, Row
from experiments.output.figures import clean, save_figures

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
_LINE_INCHES, _KEY_INCHES = 0.24, 0.7
_VARIED: dict[str, Callable[[Row], int]] = {
    "classes": lambda row: row.problem.classes,
    "rows": lambda row: row.problem.rows,
    "devices": lambda row: row.devices,
}


def save_all(
    folder: Path, rows: Sequence[Row], title: str, notices: Sequence[str] = ()
) -> list[Path]:
    """Draws what the rows have figures for and returns the paths.

    Args:
      folder: where the pictures go.
      rows: the figures.
      title: what every picture is called.
      notices: what every picture has to say.
    """
    figures: dict[str, Figure] = {}
    table = [row for row in rows if row.problem.group == "table" and row.to_optax is not None]
    shared = [row for row in table if row.problem.operation == "vocab-parallel"]
    waited = [row for row in table if row.problem.operation.startswith(("import", "compile"))]
    table = [row for row in table if row not in shared and row not in waited]
    if table:
        figures["ratios"] = ratios(table)
    if waited:
        figures["startup"] = startup(waited)
    for varied in ("classes", "rows"):
        series = [row for row in rows if row.problem.group == varied]
        if series:
            figures[f"scaling_{varied}"] = scaling(series, varied)
    if len({row.devices for row in shared}) > 1:
        figures["scaling_devices"] = scaling(shared, "devices")
    return save_figures(folder, figures, title, "\n".join(notices))


def ratios(rows: Sequence[Row]) -> Figure:
    """Time of value and gradient over optax's: a column for each dtype, a line for each shape.

    Every text is large enough for a page on which the picture is 900 pixels wide.
    """
    dtypes = list(dict.fromkeys(row.problem.dtype for row in rows))
    lines = _Lines(rows)
    figure, key, body = _with_key((9, 1.4 + _LINE_INCHES * len(lines.labels)))
    columns = body.subgridspec(1, len(dtypes)).subplots(sharex=True, sharey=True, squeeze=False)[0]
    for dtype, axes in zip(dtypes, columns, strict=True):
        axes.axvline(1, color=_STYLES[BASELINE][0], linewidth=1.5, label="optax = 1")
        for peer in _order(rows):
            if peer in (BASELINE, LIMIT):
                continue
            found = [row for row in rows if (row.peer, row.problem.dtype) == (peer, dtype)]
            _points(axes, lines, peer, found, [r.to_optax.median for r in found if r.to_optax])
        lines.draw(axes)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(labeltop=True, labelsize=10)
        axes.set_title(dtype, fontsize=11)
        axes.set_xlabel("over optax's (left is faster)", fontsize=10)
    _legend(key, *columns[0].get_legend_handles_labels())
    key.set_title("time of value and gradient, over that of optax", fontsize=11)
    return figure


def startup(rows: Sequence[Row]) -> Figure:
    """How long importing and compiling value and gradient take, beside optax."""
    lines = _Lines(rows)
    figure, key, body = _with_key((9, 0.8 + _LINE_INCHES * len(lines.labels)))
    axes = figure.add_subplot(body)
    for peer in _order(rows):
        found = [row for row in rows if row.peer == peer]
        _points(axes, lines, peer, found, [r.gradient.median for r in found if r.gradient])
        for row in found:
            if row.gradient:
                axes.plot(
                    [row.gradient.lower, row.gradient.upper],
                    [lines.position(row)] * 2,
                    color=_style(peer)[0],
                    linewidth=1.2,
                )
    lines.draw(axes)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=10)
    axes.set_xlabel("seconds, with quartiles (left is faster)", fontsize=10)
    _legend(key, *axes.get_legend_handles_labels())
    key.set_title("time of importing the library, and of compiling value and gradient", fontsize=11)
    return figure


class _Lines:
    """Lines of a picture from top to bottom: a heading for each operation, then its shapes."""

    def __init__(self, rows: Sequence[Row]):
        self.labels: list[str] = []
        self._headings: list[int] = []
        self._positions: dict[tuple[str, str], int] = {}
        for operation in dict.fromkeys(row.problem.operation for row in rows):
            self._headings.append(len(self.labels))
            self.labels.append(operation)
            problems = [row.problem for row in rows if row.problem.operation == operation]
            for shape in dict.fromkeys(problem.shape for problem in problems):
                # What has no shape is a single figure, beside the heading.
                if problems[0].rows:
                    self.labels.append(shape)
                self._positions[operation, shape] = len(self.labels) - 1

    def position(self, row: Row) -> int:
        """The line of a row, counted from the top."""
        return self._positions[row.problem.operation, row.problem.shape]

    def draw(self, axes: Axes) -> None:
        """Labels the lines and rules off the operations."""
        axes.set_yticks(range(len(self.labels)), self.labels, fontsize=10)
        for index in self._headings:
            axes.yaxis.get_major_ticks()[index].label1.set_fontweight("bold")
            axes.axhline(index - 0.5, color="#bbbbbb", linewidth=0.8)
        axes.set_ylim(len(self.labels) - 0.5, -0.5)
        clean(axes)


def _points(
    axes: Axes, lines: _Lines, peer: str, rows: Sequence[Row], values: Sequence[float]
) -> None:
    color, marker = _style(peer)
    axes.scatter(
        values,
        [lines.position(row) for row in rows],
        color=color,
        marker=marker,
        s=60 if peer == OURS else 34,
        zorder=3 if peer == OURS else 2,
        label=peer,
    )


def _with_key(size: tuple[float, float]) -> tuple[Figure, Axes, SubplotSpec]:
    """A picture with room for its key and, below that, of this size in inches for the rest.

    A legend of the figure itself would lie over the title or the notices.
    """
    width, height = size
    figure = Figure(figsize=(width, _KEY_INCHES + height), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(_KEY_INCHES, height))
    key = figure.add_subplot(grid[0])
    key.set_axis_off()
    return figure, key, grid[1]


def _legend(key: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    key.legend(handles, labels, frameon=False, fontsize=10, ncols=5, loc="upper center")


def scaling(rows: Sequence[Row], varied: str) -> Figure:
    """Time and temporaries of value and gradient against one size, with all peers."""
    operations = list(dict.fromkeys(row.problem.operation for row in rows))
    figure, key, body = _with_key((9, 3.3 * len(operations)))
    grid = body.subgridspec(len(operations), 2).subplots(squeeze=False)
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
    _legend(key, list(lines.values()), list(lines))
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
    clean(axes)


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
