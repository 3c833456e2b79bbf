"""Plots as SVG that take their colours and font from the page around them, in its light and its dark style."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Placeholder colours for matplotlib: each is replaced in the SVG by a variable of the page's style sheet.
INK, GRID = "#0a0b01", "#0a0b02"
SERIES = [f"#0a0c{i:02x}" for i in range(6)]  # of the models, in the order in which they are given
QUIET = "#0a0b03"  # of baselines and other curves for comparison
VARIABLES = {INK: "--muted", GRID: "--line", QUIET: "--quiet"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "kl-autoencoder", "font.size": 9, "axes.linewidth": 0.8,
    "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "text.color": INK, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip
DOTS = 160  # at most in a row; more values are replaced by this many quantiles

Line = tuple[Sequence[float], Sequence[float]]  # x, y


def colour(index: int) -> str:
    """The CSS colour of model number `index`: a variable of the page."""
    return f"var(--c{index % len(SERIES)})"


@contextmanager
def _figure(height: float, result: list[str]) -> Iterator[Axes]:
    """Yield axes to draw on, in a figure `height` inches high; on leaving, append its SVG to `result`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    result.append(_page_svg(file.getvalue()))


def _page_svg(svg: str) -> str:
    """Remove what does not belong in a page (header, size, font, repeated ids) and insert its colour variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # matplotlib gives these elements the same ids in every plot; ids must be unique in a page
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|matplotlib|text|xtick|ytick|Path)[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for drawn, variable in VARIABLES.items():
        svg = svg.replace(drawn, f"var({variable})")
    return svg


def rows_of_dots(rows: Sequence[tuple[str, str, Sequence[float]]], label: str) -> str:
    """Draw each of `rows`, (name, colour, values of the images), as a line of dots with a bar at their median.

    label: of the x axis. Returns SVG, as all plots here do.
    """
    result: list[str] = []
    with _figure(0.55 + 0.3 * len(rows), result) as axes:
        for y, (_, drawn, values) in enumerate(rows):
            values = np.sort(values)
            if len(values) > DOTS:
                values = np.quantile(values, np.linspace(0, 1, DOTS))
            axes.plot(values, np.full(len(values), y), "o", color=drawn, markersize=5, alpha=0.45, mew=0)
            axes.plot([np.median(values)] * 2, [y - 0.32, y + 0.32], color=drawn, linewidth=2.2)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
    return result[0]


def lines(
    curves: Sequence[tuple[str, Line]], x: str, y: str, quiet: Sequence[Line] = (), markers: bool = False
) -> str:
    """Draw lines. curves: (colour, (x values, y values)); quiet: dashed lines for comparison; x, y: axis labels."""
    result: list[str] = []
    with _figure(2.6, result) as axes:
        _curves(axes, curves, quiet, "o" if markers else None)
        _labels(axes, x, y)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return result[0]


def rates(curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], y: str) -> str:
    """Draw labelled lines over a logarithmic rate. curves: (name, colour, points (bits per pixel, value))."""
    result: list[str] = []
    with _figure(2.6, result) as axes:
        for name, drawn, points in curves:
            axes.plot(*zip(*points, strict=True), color=drawn, marker="o", markersize=4)
            axes.annotate(name, points[-1], xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_xscale("log", base=2)
        axes.margins(x=0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _labels(axes, "bits a pixel", y)
    return result[0]


def log_log(curves: Sequence[tuple[str, Line]], x: str, y: str, quiet: Sequence[Line] = ()) -> str:
    """Draw lines on two logarithmic axes; the arguments are those of `lines`."""
    result: list[str] = []
    with _figure(2.6, result) as axes:
        _curves(axes, curves, quiet, None)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _labels(axes, x, y)
    return result[0]


def histogram(
    counts: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, quiet: Sequence[Line] = ()
) -> str:
    """Draw histograms as densities, over the range of the bins that are not empty.

    counts: colour -> (edges (K + 1,), counts (K,)). x: axis label. quiet: dashed lines for comparison.
    """
    result: list[str] = []
    with _figure(2.6, result) as axes:
        low, high = np.inf, -np.inf
        for drawn, (edges, numbers) in counts.items():
            edges, numbers = np.asarray(edges), np.asarray(numbers, dtype=float)
            if not numbers.sum():
                continue
            density = numbers / numbers.sum() / np.diff(edges)
            axes.stairs(density, edges, color=drawn, linewidth=1.6)
            axes.stairs(density, edges, color=drawn, fill=True, alpha=0.12)
            seen = np.flatnonzero(numbers)
            low, high = min(low, edges[seen[0]]), max(high, edges[seen[-1] + 1])
        for line in quiet:
            axes.plot(*line, color=QUIET, linewidth=1.2, linestyle=(0, (3, 3)))
        if low < high:
            axes.set_xlim(low - 0.5, high + 0.5)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _labels(axes, x, "density")
    return result[0]


def _curves(axes: Axes, curves, quiet: Sequence[Line], marker: str | None) -> None:
    for line in quiet:
        axes.plot(*line, color=QUIET, linewidth=1.4, linestyle=(0, (3, 3)))
    for drawn, (x, y) in curves:
        # None leaves a gap
        axes.plot(x, np.asarray(y, dtype=float), color=drawn, marker=marker, markersize=4)


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
