"""The probabilities that symbols are coded with: tables of whole numbers, the same on every machine.

A symbol is a whole number of steps, counted from the whole number nearest to its predicted mean. It has a logistic
distribution around the mean, of one of `SCALES` scales; the mean lies at one of 16 places between -1/2 and 7/16:

    P(symbol = k) = F((k + 1/2 - place) / scale) - F((k - 1/2 - place) / scale),    F(x) = 1 / (1 + exp(-x))

The first and the last entry of a table take the whole tail; what is that far out is told by further bits
(`range_coding.py`). exp is rounded correctly by Python's decimal module; all else is arithmetic of whole numbers.
"""

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

REACH = 48  # symbols from -48 to 48 have an entry
PLACE_BITS = 4  # places of the mean between two whole numbers, as a power of two
PLACES = 1 << PLACE_BITS
SCALES = 36  # four a doubling, from 2 ** -4 to 2 ** 4.75 steps
SMALLEST = -4  # log2 of the smallest scale
TOTAL_BITS = 20  # the entries of a table add up to 2 ** 20
FIXED_BITS = 96


@cache
def tables() -> np.ndarray:
    """(SCALES, PLACES, 2 * REACH + 1), int32: row [i, j] for scale 2 ** (i / 4 - 4) and a mean of (j - 8) / 16."""
    rows = [_of_scale(i) for i in range(SCALES)]
    result = np.array(rows, dtype=np.int32)
    result.setflags(write=False)
    return result


def _of_scale(index: int) -> list[list[int]]:
    """The tables of one scale, for all places."""
    farthest = PLACES * REACH + PLACES
    below = _cumulative(index, farthest)  # below[n + farthest]: of x = n / PLACES / scale
    half = PLACES // 2
    rows = []
    for place in range(-half, half):
        edges = [below[PLACES * k + half - place + farthest] for k in range(-REACH, REACH)]
        rows.append(
            _with_no_zero([b - a for a, b in zip([0, *edges], [*edges, 1 << TOTAL_BITS], strict=True)])
        )
    return rows


def _cumulative(index: int, farthest: int) -> list[int]:
    """F(n / PLACES / scale) in units of 2 ** -TOTAL_BITS, for n from -farthest to farthest."""
    with localcontext() as context:
        context.prec = 50
        scale = Decimal(2) ** (Decimal(index) / 4 + SMALLEST)
        ratio = int((-1 / (PLACES * scale)).exp() * (1 << FIXED_BITS))
    power, tail = 1 << FIXED_BITS, []
    for _ in range(farthest + 1):  # F(-x) = exp(-x) / (1 + exp(-x))
        tail.append((power << TOTAL_BITS) // ((1 << FIXED_BITS) + power))
        power = power * ratio >> FIXED_BITS
    return [*reversed(tail[1:]), *((1 << TOTAL_BITS) - value for value in tail)]


def _with_no_zero(row: list[int]) -> list[int]:
    """The row with 1 in place of 0, which its largest entry pays for: any symbol can be coded."""
    largest = row.index(max(row))
    row[largest] -= row.count(0)
    return [max(value, 1) for value in row]


def cost_table() -> np.ndarray:
    """Bits of each symbol in each table, float64, as `tables`."""
    return TOTAL_BITS - np.log2(tables())
