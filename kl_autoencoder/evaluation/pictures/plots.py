"""Plots of latents by class, of a code book's use, of rate against distortion, and of the ELBO over training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from .style import ACCENT, CLASSES, INK, QUIET, SECOND, axes, titled

SEED = 0  # of t-SNE
PCA_BEFORE_TSNE = 50  # dimensions, as van der Maaten & Hinton 2008 do
MOST_BARS = 512
SAME_PLACE = 0.02  # of the range of rates: closer dots share a label


def latents_by_class(latents: ArrayLike, labels: Sequence[int] | None, names: Sequence[str] = ()) -> Figure:
    """Latents (N, D) as dots in the colours of their classes: themselves if D = 2, else by PCA and by t-SNE.

    labels: (N,), numbers of classes, or None: all in one colour. names: of the classes, by number.
    """
    latents = np.asarray(latents, np.float64)
    maps = {"Latents": latents} if latents.shape[1] == 2 else _projections(latents)
    figure, grid = axes(5.6 * len(maps) + 0.8, 5.4, columns=len(maps), squeeze=False)
    for ax, (title, (points, x, y)) in zip(grid[0], _with_names(maps).items(), strict=True):
        _dots(ax, points, labels, names)
        titled(ax, title, x, y)
        if not x:  # distances of t-SNE have no unit
            ax.set_xticks([])
            ax.set_yticks([])
    if labels is not None:
        handles, found = grid[0, -1].get_legend_handles_labels()
        figure.legend(
            handles, found, loc="outside right center", markerscale=2, labelcolor=INK, frameon=False
        )
    return figure


def _projections(latents: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if latents.shape[1] == 1:
        return {"Latents": np.concatenate((latents, np.zeros_like(latents)), axis=1)}
    dimensions = min(PCA_BEFORE_TSNE, *latents.shape)
    components = PCA(dimensions, random_state=SEED).fit_transform(latents)
    perplexity = min(30.0, max(1.0, (len(latents) - 1) / 3))
    # the tree of the fast method overflows the stack where latents are equal, as codes are
    different = len(np.unique(components.round(6), axis=0)) == len(components)
    method = "barnes_hut" if different else "exact"
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=SEED, method=method)
    embedded = tsne.fit_transform(components)
    return {"Latents by PCA": components[:, :2], "Latents by t-SNE": embedded}


def _with_names(maps: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, str, str]]:
    names = {"Latents": ("$z_0$", "$z_1$"), "Latents by PCA": ("component 1", "component 2")}
    return {title: (points, *names.get(title, ("", ""))) for title, points in maps.items()}


def _dots(ax, points: np.ndarray, labels: Sequence[int] | None, names: Sequence[str]) -> None:
    size = float(np.clip(12000 / len(points), 5, 40))
    style = {"s": size, "alpha": 0.75, "linewidths": 0}
    if labels is None:
        ax.scatter(*points.T, color=ACCENT, **style)
        return
    labels = np.asarray(labels)
    for number in np.unique(labels):
        name = str(names[number]) if number < len(names) else str(number)
        ax.scatter(*points[labels == number].T, color=CLASSES[number % len(CLASSES)], label=name, **style)


def code_usage(counts: ArrayLike, perplexity: float) -> Figure:
    """How often each code occurs, the most frequent first; the dashed line is a code book used evenly."""
    counts = np.asarray(counts, np.float64)
    shares = np.sort(counts)[::-1] / counts.sum()
    figure, ax = axes(7.2, 3.4)
    place = np.arange(len(shares))
    if len(shares) <= MOST_BARS:
        ax.bar(place, shares, width=0.85 if len(shares) < 100 else 1.0, color=ACCENT)
    else:
        ax.fill_between(place, shares, step="mid", color=ACCENT)
    ax.axhline(1 / len(shares), color=SECOND, linestyle=(0, (4, 3)), linewidth=1.2)
    ax.set_xlim(-0.6, len(shares) - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
    ax.grid(axis="x", visible=False)
    used = int((shares > 0).sum())
    titled(
        ax,
        f"{used} of {len(shares)} codes in use, perplexity {perplexity:.1f}",
        "code, by frequency",
        "share",
    )
    return figure


class RatePoint(NamedTuple):
    """Of one model: KL and -E[log p(x|z)] in nats per image, and the weight of the KL that it was trained with."""

    rate: float
    distortion: float
    beta: float


def rate_distortion(points: Sequence[RatePoint]) -> Figure:
    """Rate against distortion, a dot a beta (Alemi et al. 2018); the dashed line has the ELBO of the best dot."""
    points = sorted(points)
    rates, distortions, _ = np.array(points).T
    figure, ax = axes(5.6, 4.6)
    ax.plot(rates, distortions, color=ACCENT, marker="o", markersize=6)
    best = min(points, key=lambda point: point.rate + point.distortion)
    span = np.array([rates.min(), rates.max()])
    ax.plot(
        span, best.rate + best.distortion - span, color=QUIET, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1
    )
    for (rate, distortion), betas in _by_place(points, span).items():
        text = "$\\beta$ = " + ", ".join(f"{beta:g}" for beta in sorted(betas))
        ax.annotate(text, (rate, distortion), (7, 5), textcoords="offset points", color=INK, fontsize=9)
    ax.margins(0.12)
    titled(ax, "Rate and distortion over beta", "rate, nats per image", "distortion, nats per image")
    return figure


def _by_place(points: Sequence[RatePoint], span: np.ndarray) -> dict[tuple[float, float], list[float]]:
    """The betas of dots at one place; collapsed models all have rate 0 and one distortion."""
    places: dict[tuple[float, float], list[float]] = {}
    for rate, distortion, beta in points:
        near = [place for place in places if abs(rate - place[0]) <= SAME_PLACE * (span[1] - span[0])]
        places.setdefault(near[0] if near else (rate, distortion), []).append(beta)
    return places


def elbo_over_training(records: Sequence[dict[str, Any]]) -> Figure:
    """The negative ELBO over steps, as distortion and rate, of the lines of metrics.jsonl; nats per pixel value.

    ValueError if no line has both.
    """
    wanted = ("step", "train/reconstruction", "train/kl")
    rows = [[record[key] for key in wanted] for record in records if all(key in record for key in wanted)]
    if not rows:
        raise ValueError(
            "metrics.jsonl: no line with train/reconstruction and train/kl; allowed: a KL model's"
        )
    step, distortion, rate = np.array(rows, np.float64).T
    figure, (above, below) = axes(7.2, 5.2, rows=2, sharex=True)
    above.plot(step, distortion + rate, color=INK, label="negative ELBO")
    above.plot(step, distortion, color=ACCENT, label="distortion")
    above.legend(labelcolor=INK, frameon=False)
    below.plot(step, rate, color=SECOND)
    below.set_ylim(bottom=0)
    titled(above, "The ELBO over training", "", "nats per value")
    titled(below, "Rate", "step", "nats per value")
    return figure
