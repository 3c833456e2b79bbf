"""Whether single latents stand for single factors: MIG (Chen et al. 2018), DCI (Eastwood & Williams 2018).

Both take a table of latents (N, D), such as posterior means, and a table of factors (N, F), from which the images
were made. A factor of at most 20 different values is a class; others are numbers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 20  # of continuous values, as Locatello et al. 2019 compare models
TREES, LEAF = 30, 5  # of a forest, and the images in a leaf that keep noise from looking like a cause
HELD_OUT = 0.25  # of the images, on which factors are predicted

Table = NDArray[np.float64]


def mutual_information_gap(latents: ArrayLike, factors: ArrayLike) -> float:
    """MIG: mean over factors of (I(latent; factor) of the best latent - that of the second) / H(factor).

    0 (every latent says as much) to 1 (one latent says all of a factor, and no other anything). Continuous latents
    and factors are counted in 20 bins of equal width. ValueError for a factor that never changes.
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
    """disentanglement: each latent says something of one factor alone. completeness: each factor is in one latent.

    informativeness: how well factors are predicted of held-out images, accuracy of classes and R^2 of numbers. All
    are means, from 0 to 1 (R^2 may be below 0). importance: (D, F), of each latent for each factor.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Table


def dci(latents: ArrayLike, factors: ArrayLike, seed: int = 0) -> DCI:
    """Disentanglement, completeness and informativeness by random forests, one a factor (section 2 of the paper).

    Scores are 1 - entropy of importances, over factors for a latent and over latents for a factor, the entropy to
    the base of their number; latents count by their share of all importance.
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
    """Entropy of each row's shares, to the base of their number: (R, K) -> (R,); 1 for a row of zeros."""
    total = rows.sum(1, keepdims=True)
    shares = np.where(total > 0, rows / np.where(total > 0, total, 1), 1 / rows.shape[1])
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1) / np.log(max(2, rows.shape[1]))


def _tables(latents: ArrayLike, factors: ArrayLike) -> tuple[Table, Table]:
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
    """The number of each value's bin; equal widths from the least value to the largest."""
    edges = np.histogram_bin_edges(values, BINS)
    return np.digitize(values, edges[1:-1])
