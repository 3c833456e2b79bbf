"""Measure whether single latents stand for single factors: MIG (Chen et al. 2018), DCI (Eastwood & Williams 2018).

Both take a table of latents (N, D), such as posterior means, and a table (N, F) of the factors that the images were
made from. A factor with at most 20 different values counts as a class, any other as a number.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 20  # into which continuous values are discretised, as in Locatello et al. 2019
TREES, LEAF = 30, 5  # trees of a forest; images a leaf has at least, so that trees do not fit noise
HELD_OUT = 0.25  # share of the images on which informativeness is measured

Table = NDArray[np.float64]


def mutual_information_gap(latents: ArrayLike, factors: ArrayLike) -> float:
    """MIG: mean over factors of (largest - second largest I(latent; factor)) / H(factor), over all latents.

    From 0 (the two best latents tell equally much about each factor) to 1 (one latent tells all about a factor, the
    others nothing). Latents and factors that are numbers are discretised into 20 bins of equal width. Raises
    ValueError for tables of other shapes than (N, D) and (N, F), and for a factor that is the same in all images.
    """
    from sklearn.metrics import mutual_info_score

    latents, factors = _tables(latents, factors)
    codes = [_binned(latent) for latent in latents.T]
    gaps = []
    for factor in factors.T:
        values = _classes(factor) if _is_class(factor) else _binned(factor)
        shared = sorted([0.0, *(mutual_info_score(values, code) for code in codes)])
        gaps.append((shared[-1] - shared[-2]) / mutual_info_score(values, values))
    return float(np.mean(gaps))


class DCI(NamedTuple):
    """Scores of DCI, all means from 0 to 1, higher is better (informativeness may be negative by R^2).

    disentanglement: whether each latent tells about one factor only. completeness: whether each factor is told by
    one latent only. informativeness: how well factors are predicted on held-out images, as accuracy for classes and
    R^2 for numbers. importance: (D, F), importance of each latent for each factor.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Table


def dci(latents: ArrayLike, factors: ArrayLike, seed: int = 0) -> DCI:
    """Measure disentanglement, completeness and informativeness by one random forest per factor (section 2).

    Disentanglement is the mean over latents of 1 - the entropy of a latent's importances for the factors, with base
    F, weighted by the latent's share of all importance. Completeness is the mean over factors of 1 - the entropy of
    the latents' importances for a factor, with base D. Raises the errors of `mutual_information_gap`.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.model_selection import train_test_split

    latents, factors = _tables(latents, factors)
    columns, scores = [], []
    for factor in factors.T:
        forest = RandomForestClassifier if _is_class(factor) else RandomForestRegressor
        fitted = forest(TREES, min_samples_leaf=LEAF, max_features=None, random_state=seed)
        wanted = _classes(factor) if _is_class(factor) else factor
        x, x_held, y, y_held = train_test_split(latents, wanted, test_size=HELD_OUT, random_state=seed)
        scores.append(fitted.fit(x, y).score(x_held, y_held))
        columns.append(fitted.feature_importances_)
    importance = np.stack(columns, axis=1)
    of_latents = importance.sum(1) / importance.sum()
    disentanglement = float(of_latents @ (1 - _entropy(importance)))
    return DCI(
        disentanglement, float((1 - _entropy(importance.T)).mean()), float(np.mean(scores)), importance
    )


def _entropy(rows: Table) -> Table:
    """(R, K) -> (R,): entropy with base K of each row divided by its sum, in [0, 1]; 1 for a row of zeros."""
    total = rows.sum(1, keepdims=True)
    shares = np.where(total > 0, rows / np.where(total > 0, total, 1), 1 / rows.shape[1])
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1) / np.log(max(2, rows.shape[1]))


def _tables(latents: ArrayLike, factors: ArrayLike) -> tuple[Table, Table]:
    """Check both tables and convert them to float64."""
    latents, factors = np.asarray(latents, np.float64), np.asarray(factors, np.float64)
    if latents.ndim != 2 or factors.ndim != 2 or len(latents) != len(factors):
        raise ValueError(f"latents {latents.shape}, factors {factors.shape}; allowed: (N, D) and (N, F)")
    if fixed := [i for i, factor in enumerate(factors.T) if len(np.unique(factor)) < 2]:
        raise ValueError(
            f"factors: number {fixed[0]} has one value in all images; allowed: those that change"
        )
    return latents, factors


def _is_class(factor: Table) -> bool:
    return len(np.unique(factor)) <= BINS


def _classes(factor: Table) -> NDArray[np.int64]:
    return np.unique(factor, return_inverse=True)[1]


def _binned(values: Table) -> NDArray[np.int64]:
    """The number of each value's bin; bins have equal widths from the smallest value to the largest."""
    edges = np.histogram_bin_edges(values, BINS)
    return np.digitize(values, edges[1:-1])
