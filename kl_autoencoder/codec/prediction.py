"""The protocol of entropy models, which predict symbols pass by pass from earlier passes, and coding with them."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from .range_coding import SymbolDecoder, SymbolEncoder
from .tables import PLACE_BITS, PLACES, SMALLEST

POINTS = 16  # at which a density is evaluated within a step


class Pass(NamedTuple):
    """Pass `number` codes the symbols of one channel at the places where `mask` (h, w) is true."""

    number: int
    channel: int
    mask: np.ndarray


class Prediction(NamedTuple):
    """The logistic distribution at every place: means (h, w) in sixteenths of a step, scales (h, w) by number.

    Scale i is 2 ** (i / 4 - 4) steps, see `tables.py`.
    """

    means: np.ndarray
    scales: np.ndarray


class EntropyModel(Protocol):
    """Predicts the symbols of each pass.

    side: bytes stored in the file, from which decoding restores the model. middles: whether latents are decoded to
    the middles of their steps; else to the values that the model expects within them.
    """

    side: bytes
    middles: bool

    def passes(self, shape: tuple[int, int, int]) -> Iterator[Pass]:
        """Yield the passes over symbols of shape (C, h, w) in coding order; every symbol is in one pass."""

    def predict(self, at: Pass, symbols: np.ndarray, quality: int) -> Prediction:
        """Predict a pass from symbols (C, h, w), int32; the result may depend on those of earlier passes only."""


def everywhere(shape: tuple[int, int, int]) -> np.ndarray:
    return np.ones(shape[1:], bool)


def encode_symbols(symbols: np.ndarray, model: EntropyModel, quality: int) -> bytes:
    """Code symbols (C, h, w), int32, to bytes. Raises ValueError for one too far from its predicted mean."""
    coder = SymbolEncoder()
    for at in model.passes(symbols.shape):
        whole, places, scales = _tables_of(at, model.predict(at, symbols, quality))
        coder.encode(symbols[at.channel][at.mask] - whole, scales, places)
    return coder.finish()


def decode_symbols(
    data: bytes, shape: tuple[int, int, int], model: EntropyModel, quality: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the bytes of `encode_symbols`: symbols, int32, and latents in steps, float32, both (C, h, w).

    Raises ValueError for bytes that no symbols of this shape can have.
    """
    coder, symbols, latents = SymbolDecoder(data), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for at in model.passes(shape):
        prediction = model.predict(at, symbols, quality)
        whole, places, scales = _tables_of(at, prediction)
        found = coder.decode(scales, places) + whole
        symbols[at.channel][at.mask] = found
        means = prediction.means[at.mask]
        latents[at.channel][at.mask] = found if model.middles else expected(found, means, scales)
    coder.finish()
    return symbols, latents


def expected(symbols: np.ndarray, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The expected values of latents that were rounded to `symbols` (N,): (N,) in steps, float64.

    The expectation is under the logistic distribution that a symbol was coded with, over the step around the
    symbol. It is nearer to the mean than the middle of the step is, the more so the smaller the scale. means: (N,),
    in sixteenths of a step. scales: (N,), numbers of scales.
    """
    places = symbols[:, None] + (np.arange(POINTS) + 0.5) / POINTS - 0.5
    away = np.abs(places - means[:, None] / PLACES) / 2.0 ** (scales[:, None] / 4 + SMALLEST)
    density = np.exp(away.min(axis=1, keepdims=True) - away) / np.square(1 + np.exp(-away))
    return (density * places).sum(axis=1) / density.sum(axis=1)


def _tables_of(at: Pass, prediction: Prediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each symbol of a pass: the whole number nearest to its mean, and the place and the scale of its table.

    The place is that of the mean beside the whole number, 0 to 15 for -1/2 to 7/16.
    """
    means, scales = prediction.means[at.mask], prediction.scales[at.mask]
    whole = (means + PLACES // 2) >> PLACE_BITS
    return whole.astype(np.int32), means - PLACES * whole + PLACES // 2, scales
