"""Information in latents, MMD and usage of code books, in cases with an answer in closed form."""

import math

import pytest
import torch

from kl_autoencoder.evaluation.variational.codes import code_counts, perplexity, usage
from kl_autoencoder.evaluation.variational.discrepancy import SCALES, squared_mmd
from kl_autoencoder.evaluation.variational.information import (
    active_units,
    aggregate_log_density,
    draw,
    split_rate,
)
from kl_autoencoder.networks.distributions import DiagonalGaussian
from kl_autoencoder.networks.priors import PRIORS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_units_are_active_above_a_variance_of_a_hundredth():
    means = torch.tensor([[0.11, 0.09, 1.0], [-0.11, -0.09, 1.0]])  # variances 0.0121, 0.0081, 0
    assert active_units(means).tolist() == [True, False, False]


def test_information_of_clusters_is_the_logarithm_of_their_number():
    """8 groups of 25 images, each group with a posterior far from the others': log 8, and not log 200."""
    means = torch.arange(8.0).repeat_interleave(25)[:, None] * 100
    found = split_rate(means, torch.zeros(200, 1), generator())
    assert math.isclose(found["mutual_information"], math.log(8), rel_tol=1e-9)


def test_information_of_a_gaussian_channel():
    """Means from N(0, s^2), variance v: 1/2 log(1 + s^2/v) each, and an aggregate N(0, s^2 + v)."""
    n, spread, v = 4000, torch.tensor([1.5, 0.5], dtype=torch.float64), 0.25
    means = normal(n, 2) * spread
    logvar = torch.full((n, 2), math.log(v))
    found = split_rate(means, logvar, generator(1))
    total = spread.square() + v
    information = 0.5 * (total / v).log().sum()
    kl = 0.5 * (total - 1 - total.log()).sum()
    assert abs(found["mutual_information"] - float(information)) < 0.05
    assert abs(found["aggregate_kl"] - float(kl)) < 0.05
    rate = DiagonalGaussian(torch.cat((means, logvar), 1)[..., None, None]).kl().mean()
    assert abs(sum(found.values()) - float(rate)) < 0.05


def test_the_aggregate_is_the_mixture_of_all_posteriors():
    mean, logvar, z = normal(30, 3), 0.3 * normal(30, 3, seed=1), normal(11, 3, seed=2)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(30, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * logvar).exp()), 1),
    )
    torch.testing.assert_close(aggregate_log_density(z, mean, logvar, at_once=90), mixture.log_prob(z))
    drawn = draw(mean.expand(5000, 30, 3), logvar.expand(5000, 30, 3), generator(3))
    torch.testing.assert_close(drawn.std(0), (0.5 * logvar).exp(), rtol=0.06, atol=0)


def test_equal_distributions_have_no_discrepancy():
    """Unbiased: over many pairs of samples the mean is 0 within its standard error, and half are below."""
    values = torch.tensor(
        [squared_mmd(normal(60, 2, seed=i), normal(50, 2, seed=i + 500)) for i in range(300)]
    )
    assert values.mean().abs() < 3 * values.std() / math.sqrt(300)
    assert 0.35 < float((values < 0).double().mean()) < 0.75
    x, y = normal(60, 2), normal(50, 2, seed=1)
    assert math.isclose(squared_mmd(x, y), squared_mmd(x, y, at_once=100), rel_tol=1e-9)
    with pytest.raises(ValueError, match="samples: 1 and 50; allowed: at least 2"):
        squared_mmd(x[:1], y)


def expected_kernel(distance, variance, d):
    """E k(x, y) of x - y from N(distance, variance I), D = d: each Gaussian kernel is a Gaussian integral."""
    total = 0.0
    for scale in SCALES:
        width = scale**2 * d
        total += (width / (width + variance)) ** (d / 2) * math.exp(-(distance**2) / (2 * (width + variance)))
    return total / len(SCALES)


def test_discrepancy_of_two_gaussians():
    d, shift, deviation = 3, 0.8, 1.5
    pairs = normal(16, 2, 600, d)
    found = torch.tensor([squared_mmd(x, deviation * y + shift / math.sqrt(d)) for x, y in pairs])
    wanted = expected_kernel(0, 2, d) + expected_kernel(0, 2 * deviation**2, d)
    wanted -= 2 * expected_kernel(shift, 1 + deviation**2, d)
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.04 * wanted and abs(float(found.mean()) - wanted) < 3 * error


def test_every_prior_is_told_from_every_other():
    samples = {name: [p.sample(700, 2, generator(seed)) for seed in (0, 1)] for name, p in PRIORS.items()}
    for name, (first, second) in samples.items():
        assert abs(squared_mmd(first, second)) < 2e-3, name
        for other in samples.keys() - {name}:
            assert squared_mmd(first, samples[other][0]) > 4e-3, (name, other)


def test_a_code_book_as_large_as_its_perplexity():
    indices = torch.tensor([3, 1, 4]).repeat(20).view(4, 5, 3)
    counts = code_counts(indices, 8)
    assert counts.tolist() == [0, 20, 0, 20, 20, 0, 0, 0]
    assert math.isclose(perplexity(counts), 3, rel_tol=1e-12)
    assert usage(counts) == 3 / 8
    uneven = torch.tensor([1, 1, 2])  # entropy 1.5 bits
    assert math.isclose(perplexity(uneven), 2**1.5, rel_tol=1e-12)
    with pytest.raises(ValueError, match="indices: 8; allowed: from 0 to 7"):
        code_counts(torch.tensor([2, 8]), 8)
