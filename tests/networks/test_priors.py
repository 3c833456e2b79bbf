"""Draws of the priors: their moments, and the shapes that their definitions give."""

import math

import pytest
import torch

from kl_autoencoder.networks.priors import COMPONENTS, PETAL, PRIORS, TURNS

N = 200_000


def drawn(kind, channels=4):
    return PRIORS[kind].sample(N, channels, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("kind", PRIORS)
def test_zero_mean_unit_variance_and_independent_planes(kind):
    z = drawn(kind)
    assert z.shape == (N, 4)
    error = 5 / math.sqrt(N)
    assert z.mean(0).abs().max() < error
    variance = z.var(0)
    assert (variance.view(2, 2).mean(1) - 1).abs().max() < 3 * error
    across = (z[:, :2].T @ z[:, 2:]) / N
    assert across.abs().max() < error * variance.max()


def test_each_position_is_a_draw_of_its_own():
    prior = PRIORS["mixture"]
    noise = torch.randn(5, prior.noise_channels(4), 3, 2, generator=torch.Generator().manual_seed(1))
    z = prior.from_noise(noise)
    assert z.shape == (5, 4, 3, 2)
    torch.testing.assert_close(z[:, :, 2, 1], prior.from_noise(noise[:, :, 2, 1]))


def test_petals_are_equally_likely_and_long_along_the_radius():
    x, y = drawn("mixture", 2).T
    scale = math.sqrt(sum(length**2 for length in PETAL) / 2)
    sector = 2 * math.pi / COMPONENTS
    petal = torch.round(torch.atan2(y, x) / sector)
    counts = torch.bincount((petal % COMPONENTS).long(), minlength=COMPONENTS)
    assert (counts - N / COMPONENTS).abs().max() < 5 * math.sqrt(N / COMPONENTS)
    first = petal == 0
    assert math.isclose(x[first].mean(), PETAL[0] / scale, rel_tol=0.01)
    assert math.isclose(x[first].std(), PETAL[1] / scale, rel_tol=0.02)
    assert math.isclose(y[first].std(), PETAL[2] / scale, rel_tol=0.06)  # a few cross to other sectors


def test_the_roll_is_a_spiral_that_covers_its_disk_evenly():
    """Without noise around it the angle of a point says its radius, and the square of the radius is uniform."""
    noise = torch.zeros(N, 3, dtype=torch.float64)
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    noise[:, 0] = torch.special.ndtri(u)
    z = PRIORS["swiss_roll"].from_noise(noise)
    assert z.mean(0).abs().max() < 1e-4
    centre = PRIORS["swiss_roll"].from_noise(torch.tensor([[-40.0, 0, 0]], dtype=torch.float64))
    x, y = (z - centre).T
    radius = torch.hypot(x, y)
    unit = radius / radius.max()
    torch.testing.assert_close(unit.square(), u, atol=1e-4, rtol=0)
    turned = torch.remainder(torch.atan2(y, x) - 2 * math.pi * TURNS * u.sqrt() + 1, 2 * math.pi) - 1
    assert turned.abs().max() < 1e-6


def test_planes_need_even_channels():
    with pytest.raises(ValueError, match="channels: 3; allowed for this prior: multiples of 2"):
        PRIORS["swiss_roll"].sample(2, 3)
