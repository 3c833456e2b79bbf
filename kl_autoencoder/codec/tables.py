"""The probabilities with which symbols are coded: tables of whole numbers, the same on every machine.

A symbol is a rounded latent minus the whole number nearest to its predicted mean. It has a logistic distribution
around the mean, with one of `SCALES` scales; relative to that whole number, the mean lies at one of 16 places from
-1/2 to 7/16:

    P(symbol = k) = F((k + 1/2 - place) / scale) - F((k - 1/2 - place) / scale),    F(x) = 1 / (1 + exp(-x))

The first and the last entry of a table stand for the whole tail; further bits tell how far out a symbol is
(`range_coding.py`). Python's decimal module rounds exp correctly; everything else is integer arithmetic.
"""

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

REACH = 48  # symbols from -48 to 48 have an entry
PLACE_BITS = 4  # log2 of PLACES, the places of the mean between two whole numbers
PLACES = 1 << PLACE_BITS
SCALES = 36  # four per octave, from 2 ** -4 to 2 ** 4.75 steps
SMALLEST = -4  # log2 of the smallest scale
TOTAL_BITS = 20  # the entries of a table add up to 2 ** 20
FIXED_BITS = 96  # fractional bits of the fixed-point arithmetic


@cache
def tables() -> np.ndarray:
    """(SCALES, PLACES, 2 * REACH + 1), int32: row [i, j] for scale 2 ** (i / 4 - 4) and a mean of (j - 8) / 16."""
    rows = [_of_scale(i) for i in range(SCALES)]
    result = np.array(rows, dtype=np.int32)
    result.setflags(write=False)
    return result


def _of_scale(index: int) -> list[list[int]]:
    """The tables of scale number `index`: (PLACES, 2 * REACH + 1)."""
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
    """Raise zeros to 1, so that any symbol can be coded; the largest entry is lowered to keep the sum."""
    largest = row.index(max(row))
    row[largest] -= row.count(0)
    return [max(value, 1) for value in row]


def cost_table() -> np.ndarray:
    """The bits that each entry of each table costs: float64, in the shape of `tables`."""
    return TOTAL_BITS - np.log2(tables())
