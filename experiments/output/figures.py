"""What all pictures have in common: a style, and the title and the notice that each carries."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour and marker of the methods of a study, in their order; the first is the plain loss.
STYLES = (
    ("#222222", "o"),
    ("#2166ac", "s"),
    ("#e08214", "^"),
    ("#1b7837", "D"),
    ("#b2182b", "v"),
    ("#762a83", "P"),
    ("#35978f", "X"),
    ("#8c510a", "<"),
)
_NOTICE_COLOR = "#b2182b"


def clean(axes: Axes) -> None:
    """A light grid, and no frame on the upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def save_figures(
    folder: Path, figures: Mapping[str, Figure], title: str, notice: str, dots_per_inch: int = 130
) -> list[Path]:
    """Writes each figure as PNG under its title, with the notice where there is one.

    Returns:
      The paths.
    """
    paths = []
    for name, figure in figures.items():
        figure.suptitle(title, fontsize=11)
        if notice:
            figure.supxlabel(notice, color="white", backgroundcolor=_NOTICE_COLOR, fontsize=10)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=dots_per_inch)
    return paths
