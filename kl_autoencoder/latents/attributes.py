"""Find the images with and without an attribute by a column of a table, such as CelebA's (1 and -1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def rows_of_kinds(values: Sequence[Any], limit: int) -> tuple[list[int], list[int]]:
    """Return the row numbers with the attribute and those without, at most `limit` of each, spread evenly.

    values: the column, numbers or truth values. If it has two different values, the greater one means with; if it
    has more, those above their median do. Rows of None and NaN are in neither list. Raises ValueError for other
    values, and for a column with fewer than two different ones.
    """
    known = [(row, value) for row, value in enumerate(values) if value is not None]
    if strange := [value for _, value in known if not isinstance(value, (bool, int, float))]:
        raise ValueError(f"{strange[0]!r}; allowed: numbers, true and false")
    rows = np.array([row for row, _ in known], dtype=np.int64)
    numbers = np.array([value for _, value in known], dtype=np.float64)
    rows, numbers = rows[~np.isnan(numbers)], numbers[~np.isnan(numbers)]
    found = np.unique(numbers)
    if len(found) < 2:
        raise ValueError(f"{len(found)} different values; allowed: at least 2")
    has = numbers > min(np.median(numbers), found[-2])
    return _evenly_spread(rows[has], limit), _evenly_spread(rows[~has], limit)


def _evenly_spread(rows: np.ndarray, limit: int) -> list[int]:
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), limit)).round().astype(int)
    return rows[chosen].tolist()
