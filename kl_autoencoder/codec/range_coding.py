"""Code symbols by constriction's range coder with the probabilities of `tables.py`.

The range coder is a queue: symbols are decoded in the order in which they were encoded, so that later ones can be
predicted from earlier ones. Decoding must be given the same tables in the same order. constriction takes entries of
tables as float32, which is exact, as they are whole numbers below 2 ** 24.
"""

import numpy as np

from ..extras import needs
from .tables import REACH, tables

SYMBOLS_AT_A_TIME = 1 << 14  # symbols per call, whose rows of tables take 6 MB
MOST_BITS = 16  # the distance of a symbol from the end of its table is below 2 ** 16


class DamagedStream(ValueError):
    """Raised for bytes that no encoder can have written."""


class SymbolEncoder:
    """Encodes symbols: call `encode` any number of times, then `finish`."""

    def __init__(self) -> None:
        self._stream = _constriction()
        self._coder = self._stream.queue.RangeEncoder()
        self._categorical = self._stream.model.Categorical(perfect=False)

    def encode(self, symbols: np.ndarray, scales: np.ndarray, places: np.ndarray) -> None:
        """Append symbols (N,), each with the table of its scale and place.

        Raises ValueError for a symbol 2 ** 16 or more from the end of its table.
        """
        symbols = symbols.astype(np.int32)
        for part in _parts(len(symbols)):
            inside = symbols[part].clip(-REACH, REACH) + np.int32(REACH)
            self._coder.encode(inside, self._categorical, _rows(scales[part], places[part]))
            self._encode_distances(np.abs(symbols[part][_is_end(inside)]) - REACH)

    def _encode_distances(self, distances: np.ndarray) -> None:
        """Append each distance + 1 in Elias' gamma code: its number of bits, then its bits after the first."""
        uniform = self._stream.model.Uniform
        for value in (distances + 1).tolist():
            bits = value.bit_length() - 1
            if bits >= MOST_BITS:
                raise ValueError(
                    f"a latent is {value:,} steps from its mean; allowed: up to {1 << MOST_BITS:,}"
                )
            self._coder.encode(bits, uniform(MOST_BITS))
            if bits:
                self._coder.encode(value - (1 << bits), uniform(1 << bits))

    def finish(self) -> bytes:
        """Return the bytes, without zeros at the end: the decoder fills them in."""
        return self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class SymbolDecoder:
    """Decodes the bytes of `SymbolEncoder`: call `decode` with the same tables in the same order, then `finish`."""

    def __init__(self, data: bytes):
        self._stream = _constriction()
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._coder = self._stream.queue.RangeDecoder(words)
        self._categorical = self._stream.model.Categorical(perfect=False)

    def decode(self, scales: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the next symbols (N,), int32. Raises DamagedStream for bytes that cannot be decoded."""
        found = []
        for part in _parts(len(scales)):
            inside = self._decoded(self._categorical, _rows(scales[part], places[part]))
            symbols = inside - np.int32(REACH)
            ends = np.flatnonzero(_is_end(inside))
            for i in ends:
                symbols[i] += np.sign(symbols[i]) * self._distance()
            found.append(symbols)
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def _distance(self) -> int:
        uniform = self._stream.model.Uniform
        bits = int(self._decoded(uniform(MOST_BITS)))
        return (1 << bits) - 1 + (int(self._decoded(uniform(1 << bits))) if bits else 0)

    def _decoded(self, *model) -> np.ndarray:
        try:
            return self._coder.decode(*model)
        except (
            AssertionError,
            ValueError,
        ) as error:  # constriction raises these for damaged data
            raise DamagedStream("its coded latents are damaged") from error

    def finish(self) -> None:
        """Raise DamagedStream if bytes are left over."""
        if not self._coder.maybe_exhausted():
            raise DamagedStream("more coded latents than its size has")


def _constriction():
    with needs("codec"):
        import constriction
    return constriction.stream


def _parts(length: int) -> list[slice]:
    starts = range(0, length, SYMBOLS_AT_A_TIME)
    return [slice(start, start + SYMBOLS_AT_A_TIME) for start in starts]


def _rows(scales: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The table of each symbol, (N, 2 * REACH + 1)."""
    return tables()[scales, places].astype(np.float32)


def _is_end(inside: np.ndarray) -> np.ndarray:
    """Whether an entry is the first or last of a table, which stand for everything beyond, too."""
    return (inside == 0) | (inside == 2 * REACH)
