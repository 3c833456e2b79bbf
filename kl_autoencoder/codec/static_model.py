"""The static entropy model: a mean and a scale for each channel, the same over the whole image, stored in the file.

It needs no training, so that any autoencoder can be used, and it is the baseline of learned models.
"""

import struct
from collections.abc import Iterator

import numpy as np

from .prediction import Pass, Prediction, everywhere
from .tables import PLACE_BITS, PLACES, REACH, SCALES, cost_table

CHANNEL = struct.Struct("<hB")  # mean in sixteenths of a step, number of the scale


class StaticModel:
    """An `EntropyModel`. means: of the channels, in sixteenths of a step. scales: the numbers of their scales."""

    middles = False

    def __init__(self, means: list[int], scales: list[int]):
        self.means, self.scales = means, scales

    @classmethod
    def fit(cls, symbols: np.ndarray) -> "StaticModel":
        """Fit the model to the symbols (C, h, w) of an image: means of channels, and the scales of fewest bits."""
        means = [
            int(np.clip(round(float(channel.mean()) * PLACES), -(1 << 15), (1 << 15) - 1))
            for channel in symbols
        ]
        return cls(means, [_best_scale(c, mean) for c, mean in zip(symbols, means, strict=True)])

    @classmethod
    def from_side(cls, side: bytes, channels: int) -> "StaticModel":
        """The inverse of `side`. Raises ValueError for bytes that `side` cannot have returned."""
        if len(side) != channels * CHANNEL.size:
            raise ValueError(f"damaged: static tables of {len(side)} bytes for {channels} channels")
        means, scales = zip(*CHANNEL.iter_unpack(side), strict=True)
        if max(scales) >= SCALES:
            raise ValueError(f"damaged: scale {max(scales)}; allowed: 0 to {SCALES - 1}")
        return cls(list(means), list(scales))

    @property
    def side(self) -> bytes:
        return b"".join(CHANNEL.pack(*pair) for pair in zip(self.means, self.scales, strict=True))

    def passes(self, shape: tuple[int, int, int]) -> Iterator[Pass]:
        return (Pass(channel, channel, everywhere(shape)) for channel in range(shape[0]))

    def predict(self, at: Pass, symbols: np.ndarray, quality: int) -> Prediction:
        shape = at.mask.shape
        return Prediction(np.full(shape, self.means[at.channel]), np.full(shape, self.scales[at.channel]))


def _best_scale(channel: np.ndarray, mean: int) -> int:
    """The number of the scale with which the symbols (h, w) of a channel take the fewest bits."""
    whole = (mean + PLACES // 2) >> PLACE_BITS
    place = mean - PLACES * whole + PLACES // 2
    entries = (channel.astype(np.int64) - whole).clip(-REACH, REACH) + REACH
    counts = np.bincount(entries.ravel(), minlength=2 * REACH + 1)
    return int(np.argmin(cost_table()[:, place] @ counts))
