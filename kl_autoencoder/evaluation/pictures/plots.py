"""Plots: latents by class, use of a code book, rate against distortion, the ELBO over training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from .style import ACCENT, CLASSES, INK, QUIET, SECOND, axes, titled

SEED = 0  # of t-SNE
PCA_BEFORE_TSNE = 50  # dimensions that PCA leaves for t-SNE, following van der Maaten & Hinton 2008
MOST_BARS = 512  # larger code books are drawn as an area
SAME_PLACE = 0.02  # dots share a label if their rates differ by at most this part of the range of rates


def latents_by_class(latents: ArrayLike, labels: Sequence[int] | None, names: Sequence[str] = ()) -> Figure:
    """Draw latents (N, D) as dots coloured by class: directly if D is 1 or 2, else by PCA and by t-SNE.

    labels: (N,), class numbers, or None for one colour. names: names of the classes, by number.
    """
    latents = np.asarray(latents, np.float64)
    maps = {"Latents": latents} if latents.shape[1] == 2 else _projections(latents)
    figure, grid = axes(5.6 * len(maps) + 0.8, 5.4, columns=len(maps), squeeze=False)
    for ax, (title, (points, x, y)) in zip(grid[0], _with_axis_names(maps).items(), strict=True):
        _dots(ax, points, labels, names)
        titled(ax, title, x, y)
        if not x:  # t-SNE: its coordinates have no meaning of their own
            ax.set_xticks([])
            ax.set_yticks([])
    if labels is not None:
        handles, found = grid[0, -1].get_legend_handles_labels()
        figure.legend(
            handles, found, loc="outside right center", markerscale=2, labelcolor=INK, frameon=False
        )
    return figure


def _projections(latents: np.ndarray) -> dict[str, np.ndarray]:
    """Latents (N, D) with D other than 2 -> title and points (N, 2) of each map."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if latents.shape[1] == 1:
        return {"Latents": np.concatenate((latents, np.zeros_like(latents)), axis=1)}
    dimensions = min(PCA_BEFORE_TSNE, *latents.shape)
    components = PCA(dimensions, random_state=SEED).fit_transform(latents)
    perplexity = min(30.0, max(1.0, (len(latents) - 1) / 3))
    # Barnes-Hut overflows the stack if points are equal, as the latents of a code book can be.
    different = len(np.unique(components.round(6), axis=0)) == len(components)
    method = "barnes_hut" if different else "exact"
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=SEED, method=method)
    embedded = tsne.fit_transform(components)
    return {"Latents by PCA": components[:, :2], "Latents by t-SNE": embedded}


def _with_axis_names(maps: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, str, str]]:
    """Add the names of both axes to each map; those of t-SNE have none."""
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
    """Draw the share of each code, most frequent first; the dashed line is the share if all were used equally.

    counts: (codes,), how often each occurs. perplexity: of these counts, for the title.
    """
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
    """Rate and distortion of one model, and the KL weight that it was trained with."""

    rate: float  # KL in nats per image
    distortion: float  # -E[log p(x|z)] in nats per image
    beta: float


def rate_distortion(points: Sequence[RatePoint]) -> Figure:
    """Draw rate against distortion, one dot per model (Alemi et al. 2018).

    On the dashed line the ELBO, -(rate + distortion), is that of the best model.
    """
    points = sorted(points)
    rates, distortions, _ = np.array(points).T
    figure, ax = axes(5.6, 4.6)
    ax.plot(rates, distortions, color=ACCENT, marker="o", markersize=6)
    best = min(points, key=lambda point: point.rate + point.distortion)
    span = np.array([rates.min(), rates.max()])
    ax.plot(
        span, best.rate + best.distortion - span, color=QUIET, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1
    )
    for (rate, distortion), betas in _betas_by_dot(points, span).items():
        text = "$\\beta$ = " + ", ".join(f"{beta:g}" for beta in sorted(betas))
        ax.annotate(text, (rate, distortion), (7, 5), textcoords="offset points", color=INK, fontsize=9)
    ax.margins(0.12)
    titled(ax, "Rate and distortion over beta", "rate, nats per image", "distortion, nats per image")
    return figure


def _betas_by_dot(points: Sequence[RatePoint], span: np.ndarray) -> dict[tuple[float, float], list[float]]:
    """(rate, distortion) -> betas, those of nearly equal rates together: collapsed models all lie at rate 0.

    span: (2,), smallest and largest rate.
    """
    places: dict[tuple[float, float], list[float]] = {}
    for rate, distortion, beta in points:
        near = [place for place in places if abs(rate - place[0]) <= SAME_PLACE * (span[1] - span[0])]
        places.setdefault(near[0] if near else (rate, distortion), []).append(beta)
    return places


def elbo_over_training(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw the negative ELBO over training steps with its parts, distortion and rate, in nats per pixel value.

    records: lines of metrics.jsonl. Raises ValueError if none has both train/reconstruction and train/kl.
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
