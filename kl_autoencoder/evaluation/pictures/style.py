"""The style of the figures, and how they are saved: as PNG on white."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...files import replacing

INK, LINE, ACCENT, QUIET = "#3c4043", "#e3e5e8", "#2f6fb5", "#9aa0a6"
SECOND = "#d9722e"
CLASSES = [*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["tab20"][1::2]]
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "xtick.major.size": 0, "ytick.major.size": 0, "savefig.dpi": 144,
}  # fmt: skip


def axes(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Make a figure of `width` x `height` inches: (figure, its axes); several axes come as an array.

    options: passed to `Figure.subplots`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        return figure, figure.subplots(rows, columns, **options)


def titled(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Set the title and the labels of both axes."""
    with matplotlib.rc_context(STYLE):
        ax.set_title(title)
        ax.set_xlabel(x)
        ax.set_ylabel(y)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; an error leaves a file that was there before unchanged."""
    with replacing(path) as temporary, temporary.open("wb") as file, matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
