"""Steps and tables equal their formulas, and are the same numbers on every machine."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import logistic

from kl_autoencoder.codec import steps
from kl_autoencoder.codec.tables import PLACES, REACH, SCALES, TOTAL_BITS, tables


def test_sixteen_qualities_halve_the_step():
    found = [steps.step_of(quality) for quality in range(1, 101)]
    np.testing.assert_allclose(found, 2.0 ** ((40 - np.arange(1, 101)) / 16), rtol=1e-5)
    assert all(a / b == 2 for a, b in zip(found, found[16:], strict=False))
    assert all(np.float32(step) == step for step in found)


@pytest.mark.parametrize("quality", [1, 39, 40, 41, 77, 100])
def test_conversions_are_rounded_exactly(quality):
    symbols = np.arange(-3000, 3001)
    step = Fraction(steps.step_of(quality))
    wanted = [int((n * step * 32 + Fraction(1, 2)) // 1) for n in symbols.tolist()]
    assert steps.steps_to_deviations(symbols, quality, 5).tolist() == wanted
    back = steps.deviations_to_steps(np.array(wanted), quality, 5, 4)
    np.testing.assert_allclose(back / 16, symbols, atol=float(1 / step) / 64 + 1 / 32 + 0.05)


@pytest.mark.parametrize("quality", [0, 101, -3, 4.0, True, None])
def test_there_are_a_hundred_qualities(quality):
    with pytest.raises(ValueError, match="quality: .*; allowed: whole numbers from 1 to 100"):
        steps.step_of(quality)


def test_tables_are_logistic_distributions():
    edges = np.arange(-REACH, REACH) + 0.5
    for scale in range(SCALES):
        for place in range(PLACES):
            below = logistic.cdf(edges, (place - 8) / 16, 2.0 ** (scale / 4 - 4))
            wanted = np.diff([0, *below, 1])
            np.testing.assert_allclose(tables()[scale, place] / 2**TOTAL_BITS, wanted, atol=1.1e-4)


def test_every_symbol_can_be_coded_and_the_whole_is_one():
    assert tables().min() == 1
    assert (tables().sum(axis=2) == 2**TOTAL_BITS).all()


def test_the_tables_are_those_that_files_were_written_with():
    digest = hashlib.sha256(tables().astype("<i4").tobytes()).hexdigest()
    assert digest == "fa9f8abd62a427db8cf7a0df56d41745246e0f673ed5f2c3438e2dc74b4d4ce4"
