"""Decoding gives the encoded symbols, and the bytes are as many as the tables' cross-entropy."""

import numpy as np
import pytest
from scipy.stats import logistic

from kl_autoencoder.codec import range_coding
from kl_autoencoder.codec.range_coding import DamagedStream, SymbolDecoder, SymbolEncoder
from kl_autoencoder.codec.tables import REACH, cost_table


def drawn(count, seed, largest_scale=20):
    """Symbols from their own tables' distributions."""
    numbers = np.random.default_rng(seed)
    scales, places = numbers.integers(0, largest_scale, count), numbers.integers(0, 16, count)
    values = logistic.rvs(size=count, random_state=numbers) * 2.0 ** (scales / 4 - 4) + (places - 8) / 16
    return np.round(values).astype(np.int32), scales, places


def coded(*batches):
    encoder = SymbolEncoder()
    for batch in batches:
        encoder.encode(*batch)
    return encoder.finish()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000, range_coding.SYMBOLS_AT_A_TIME + 3])
def test_decoding_is_the_inverse(count):
    for seed in range(5):
        first, second = drawn(count, seed), drawn(11, seed + 100)
        decoder = SymbolDecoder(coded(first, second))
        for symbols, scales, places in (first, second):
            np.testing.assert_array_equal(decoder.decode(scales, places), symbols)
        decoder.finish()


def test_bytes_are_the_cross_entropy():
    symbols, scales, places = drawn(20_000, 0, largest_scale=16)
    bits = cost_table()[scales, places, symbols + REACH].sum()
    assert bits / 8 <= len(coded((symbols, scales, places))) <= bits / 8 * 1.001 + 8


def test_symbols_far_beyond_the_tables_are_coded_up_to_a_limit():
    symbols = np.array([-65_000, -REACH - 1, -REACH, REACH, REACH + 1, 4000, 65_000], np.int32)
    scales, places = np.full(7, 12), np.full(7, 3)
    decoder = SymbolDecoder(coded((symbols, scales, places)))
    np.testing.assert_array_equal(decoder.decode(scales, places), symbols)
    with pytest.raises(ValueError, match="a latent is 69,9.. steps from its mean; allowed: up to 65,536"):
        coded((np.array([70_000]), scales[:1], places[:1]))


def test_random_bytes_end_in_symbols_or_in_a_damaged_stream():
    numbers, refused = np.random.default_rng(0), 0
    _, scales, places = drawn(500, 1)
    for _ in range(200):
        try:
            decoder = SymbolDecoder(numbers.bytes(int(numbers.integers(0, 400))))
            decoder.decode(scales, places)
            decoder.finish()
        except DamagedStream:
            refused += 1
    assert refused > 50
