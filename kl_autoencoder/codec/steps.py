"""The quality of a file and its quantisation step, in integer arithmetic, so that all machines agree on them.

Qualities are whole numbers from 1 to 100; raising the quality by 16 halves the step. Latents are scaled to about
unit deviation (`KLAutoencoder.scale`) and divided by the step; at quality 40 they are rounded to whole deviations.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands read headers without importing anything heavy
    import numpy as np

LOWEST, HIGHEST, DEFAULT_QUALITY = 1, 100, 40
UNIT_STEP = 40  # the quality whose step is one deviation
A_HALVING = 16  # qualities that halve the step
ROOTS = (  # 2 ** (i / 16), in units of 2 ** -16
    *(65536, 68438, 71468, 74632, 77936, 81386, 84990, 88752),
    *(92682, 96785, 101070, 105545, 110218, 115098, 120194, 125515),
)
ROOT_BITS = 16


def step_of(quality: int) -> float:
    """The quantisation step in deviations: 2 ** ((40 - quality) / 16), rounded to a value that float32 can hold.

    Raises ValueError for a quality out of range.
    """
    octaves, root = divmod(UNIT_STEP - check_quality(quality), A_HALVING)
    return ROOTS[root] / 2**ROOT_BITS * 2.0**octaves


def steps_to_deviations(symbols: "np.ndarray", quality: int, bits: int) -> "np.ndarray":
    """Whole steps -> deviations in units of 2 ** -bits, rounded; int64, exact for bits up to 8."""
    return _times_power(symbols, UNIT_STEP - quality, -bits)


def deviations_to_steps(values: "np.ndarray", quality: int, bits: int, to_bits: int) -> "np.ndarray":
    """Deviations in units of 2 ** -bits -> steps in units of 2 ** -to_bits, rounded; int64, exact."""
    return _times_power(values, quality - UNIT_STEP, bits - to_bits)


def _times_power(values: "np.ndarray", sixteenths: int, bits: int) -> "np.ndarray":
    """round(values * 2 ** (sixteenths / 16) * 2 ** -bits), halves rounded up."""
    octaves, root = divmod(sixteenths, A_HALVING)
    shift = ROOT_BITS + bits - octaves
    return (values.astype("int64") * ROOTS[root] + (1 << (shift - 1))) >> shift


def check_quality(quality: int) -> int:
    """Return `quality`. Raises ValueError unless it is a whole number from 1 to 100."""
    whole = isinstance(quality, int) and not isinstance(quality, bool)
    if not whole or not LOWEST <= quality <= HIGHEST:
        raise ValueError(f"quality: {quality!r}; allowed: whole numbers from {LOWEST} to {HIGHEST}")
    return quality
