"""What an entropy model is: it predicts symbols pass by pass, each from those of the passes before."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from .range_coding import SymbolDecoder, SymbolEncoder
from .tables import PLACE_BITS, PLACES


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


def decode_symbols(data: bytes, shape: tuple[int, int, int], model: EntropyModel, quality: int) -> np.ndarray:
    """The inverse. Raises ValueError for bytes that cannot be those of such symbols."""
    coder, symbols = SymbolDecoder(data), np.zeros(shape, np.int32)
    for at in model.passes(shape):
        whole, places, scales = _tables_of(at, model.predict(at, symbols, quality))
        symbols[at.channel][at.mask] = coder.decode(scales, places) + whole
    coder.finish()
    return symbols


def _tables_of(at: Pass, prediction: Prediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each symbol of a pass: the whole number nearest to its mean, the mean's place beside it, the scale."""
    means, scales = prediction.means[at.mask], prediction.scales[at.mask]
    whole = (means + PLACES // 2) >> PLACE_BITS
    return whole.astype(np.int32), means - PLACES * whole + PLACES // 2, scales
