"""What an entropy model is: it predicts symbols pass by pass, each from those of the passes before."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from .range_coding import SymbolDecoder, SymbolEncoder
from .tables import PLACE_BITS, PLACES, SMALLEST

POINTS = 16  # of a step, at which a density is taken


class Pass(NamedTuple):
    """The pass of this number: symbols of one channel, at the places where `mask` (h, w) is true."""

    number: int
    channel: int
    mask: np.ndarray


class Prediction(NamedTuple):
    """Whole numbers at every place (h, w): the mean in sixteenths of a step, the number of the scale."""

    means: np.ndarray
    scales: np.ndarray


class EntropyModel(Protocol):
    """side: what the file keeps for it."""

    side: bytes

    def passes(self, shape: tuple[int, int, int]) -> Iterator[Pass]:
        """Every place of symbols (C, h, w) once, in the order in which they are coded."""

    def predict(self, at: Pass, symbols: np.ndarray, quality: int) -> Prediction:
        """Of a pass, from symbols (C, h, w), int32, of which nothing but those of earlier passes may count."""


def everywhere(shape: tuple[int, int, int]) -> np.ndarray:
    return np.ones(shape[1:], bool)


def encode_symbols(symbols: np.ndarray, model: EntropyModel, quality: int) -> bytes:
    """Symbols (C, h, w), int32 -> their bytes."""
    coder = SymbolEncoder()
    for at in model.passes(symbols.shape):
        whole, places, scales = _tables_of(at, model.predict(at, symbols, quality))
        coder.encode(symbols[at.channel][at.mask] - whole, scales, places)
    return coder.finish()


def decode_symbols(
    data: bytes, shape: tuple[int, int, int], model: EntropyModel, quality: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse: symbols (C, h, w), int32, and the latents that they most likely stand for, in steps, float32.

    Raises ValueError for bytes that cannot be those of such symbols.
    """
    coder, symbols, latents = SymbolDecoder(data), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for at in model.passes(shape):
        prediction = model.predict(at, symbols, quality)
        whole, places, scales = _tables_of(at, prediction)
        found = coder.decode(scales, places) + whole
        symbols[at.channel][at.mask] = found
        latents[at.channel][at.mask] = expected(found, prediction.means[at.mask], scales)
    coder.finish()
    return symbols, latents


def expected(symbols: np.ndarray, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The expected values of latents that were rounded to `symbols` (N,), in steps, float64.

    By the logistic distributions that the symbols were coded with, over the step around each: nearer to the mean
    than its middle, the more so the smaller the scale. means: in sixteenths of a step; scales: numbers of tables.
    """
    places = symbols[:, None] + (np.arange(POINTS) + 0.5) / POINTS - 0.5
    away = np.abs(places - means[:, None] / PLACES) / 2.0 ** (scales[:, None] / 4 + SMALLEST)
    density = np.exp(away.min(axis=1, keepdims=True) - away) / np.square(1 + np.exp(-away))
    return (density * places).sum(axis=1) / density.sum(axis=1)


def _tables_of(at: Pass, prediction: Prediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each symbol of a pass: the whole number nearest to its mean, the mean's place beside it, the scale."""
    means, scales = prediction.means[at.mask], prediction.scales[at.mask]
    whole = (means + PLACES // 2) >> PLACE_BITS
    return whole.astype(np.int32), means - PLACES * whole + PLACES // 2, scales
