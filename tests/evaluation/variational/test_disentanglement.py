"""MIG and DCI of latents that are factors, mixtures of factors, and noise."""

import math

import numpy as np
import pytest

from kl_autoencoder.evaluation.variational.disentanglement import dci, mutual_information_gap

GRID = (
    np.stack(np.meshgrid(*[np.arange(n) for n in (5, 4, 3)], indexing="ij"), -1).reshape(-1, 3).repeat(10, 0)
)
RANDOM = np.random.default_rng(0)


def test_latents_that_are_factors_in_another_order():
    latents = -2.5 * GRID[:, [2, 0, 1]] + 1
    assert math.isclose(mutual_information_gap(latents, GRID), 1, rel_tol=1e-12)
    found = dci(latents, GRID)
    assert found.importance.argmax(0).tolist() == [1, 2, 0]
    assert min(found[:3]) > 0.99


def test_noise():
    noise = RANDOM.normal(size=(len(GRID), 4))
    assert mutual_information_gap(noise, GRID) < 0.03
    found = dci(noise, GRID)
    assert found.disentanglement < 0.05 and found.completeness < 0.05
    assert found.informativeness < 0.45  # by chance 1/5, 1/4 and 1/3


def test_a_factor_in_two_latents_alike_leaves_no_gap_and_is_not_complete():
    latents = np.concatenate((GRID, GRID), axis=1)
    assert mutual_information_gap(latents, GRID) == 0
    found = dci(latents, GRID)
    assert found.disentanglement > 0.99 and found.informativeness > 0.99
    # two latents of six share each factor: 1 - log 2 / log 6
    assert math.isclose(found.completeness, 1 - math.log(2) / math.log(6), abs_tol=0.08)


def test_the_gap_of_a_mixture_is_its_definition():
    """Latent 0 says which half a factor of four values is in: 1 bit of 2; latent 1 says nothing."""
    factor = np.tile(np.arange(4), 50)
    latents = np.stack((factor // 2, np.repeat(np.arange(50) % 2, 4)), 1)
    assert math.isclose(mutual_information_gap(latents, factor[:, None]), 0.5, rel_tol=1e-9)


def test_factors_that_are_numbers():
    factors = RANDOM.uniform(size=(1000, 2))
    turned = factors @ np.array([[1, 1], [1, -1]])
    straight = factors[:, ::-1] * 3
    assert mutual_information_gap(straight, factors) > 0.9 > 0.2 > mutual_information_gap(turned, factors)
    assert dci(straight, factors).disentanglement > 0.95
    assert dci(straight, factors).informativeness > 0.95
    assert dci(turned, factors).disentanglement < 0.2


def test_factors_of_other_shapes_or_without_variation_are_refused():
    with pytest.raises(ValueError, match=r"latents \(3, 2\), factors \(4, 1\); allowed"):
        mutual_information_gap(np.zeros((3, 2)), np.arange(4)[:, None])
    with pytest.raises(ValueError, match="factors: number 1 has one value in all images"):
        dci(np.zeros((4, 2)), np.stack((np.arange(4), np.ones(4)), 1))
