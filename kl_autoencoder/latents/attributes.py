"""Which images have an attribute, by a column of a table: CelebA's are 1 and -1, or true and false."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def rows_of_kinds(values: Sequence[Any], limit: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows with the attribute and of those without, at most `limit` each, spread evenly.

    Of two different numbers or truth values the greater one is with it; of more than two, those above their median.
    None and NaN are neither. ValueError for other values, and for a column of one value.
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
    return _spread(rows[has], limit), _spread(rows[~has], limit)


def _spread(rows: np.ndarray, limit: int) -> list[int]:
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), limit)).round().astype(int)
    return rows[chosen].tolist()
