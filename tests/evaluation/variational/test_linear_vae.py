"""A linear variational autoencoder, trained by stochastic gradients, reaches probabilistic PCA (Lucas et al. 2019).

Its parts are the training program's: the posterior, its draws and its KL, and the Gaussian likelihood.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kl_autoencoder.evaluation.variational.bounds import (
    Likelihood,
    elbo,
    importance_weights,
    posterior_of,
)
from kl_autoencoder.evaluation.variational.information import active_units
from kl_autoencoder.evaluation.variational.linear_gaussian import covariance_eigenvalues, probabilistic_pca
from kl_autoencoder.networks.distributions import DiagonalGaussian
from train.autoencoder.likelihoods import reconstruction_nll

DIMENSIONS, LATENTS, STEPS = 8, 4, 1500


class LinearVAE(nn.Module):
    """Images (B, D, 1, 1), latents (B, C, 1, 1); the variance of the posterior is the same for every image."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(DIMENSIONS, LATENTS), nn.Linear(LATENTS, DIMENSIONS)
        self.logvar = nn.Parameter(torch.zeros(LATENTS))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def encode(self, images):
        mean = self.encoder(images.flatten(1))
        moments = torch.cat((mean, self.logvar.expand_as(mean)), 1)
        return SimpleNamespace(latent_dist=DiagonalGaussian(moments[..., None, None]))

    def decode(self, z):
        return SimpleNamespace(sample=self.decoder(z.flatten(1))[..., None, None])


def trained(x, log_scale=None):
    """`log_scale`: fixed, or None: learned."""
    torch.manual_seed(0)
    model = LinearVAE()
    if log_scale is not None:
        model.log_scale.requires_grad_(False).fill_(log_scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    noise = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        posterior = model.encode(x).latent_dist
        decoded = model.decode(posterior.sample(noise)).sample
        nll = reconstruction_nll("gaussian", decoded, x, model.log_scale).sum((1, 2, 3))
        optimizer.zero_grad()
        (nll + posterior.kl()).mean().backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def images():
    """Four strong directions, the eigenvalues 4, 2, 1 and 0.5, and noise of 0.1 to 0.16 in the others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, DIMENSIONS, generator=generator, dtype=torch.float64)
    _, _, whitening = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    white = (rows - rows.mean(0)) @ whitening.T
    white = white / white.square().mean(0).sqrt()
    turned, _ = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64))
    scales = torch.tensor([4, 2, 1, 0.5, 0.16, 0.14, 0.12, 0.1], dtype=torch.float64).sqrt()
    return ((white * scales) @ turned + 0.3).float()[..., None, None]


def mean_elbo(model, x):
    weights = importance_weights(
        model, x, Likelihood("gaussian", float(model.log_scale)), 200, torch.Generator().manual_seed(2)
    )
    return float(elbo(weights, posterior_of(model, x).kl()).mean())


def largest_angle(a, b):
    """Degrees between the subspaces that the columns of two matrices span."""
    (a, _), (b, _) = torch.linalg.qr(a.double()), torch.linalg.qr(b.double())
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(a.T @ b).min()))))


def test_training_finds_the_principal_subspace_the_noise_and_the_exact_likelihood():
    x = images()
    flat, model = x.flatten(1), trained(x)
    exact = probabilistic_pca(flat, LATENTS)
    eigenvalues, _ = covariance_eigenvalues(flat)
    assert math.isclose(exact.variance, float(eigenvalues[LATENTS:].mean()), rel_tol=1e-9)

    assert math.isclose(math.exp(2 * model.log_scale), exact.variance, rel_tol=0.02)
    assert largest_angle(model.decoder.weight, exact.weight) < 3
    best = float(exact.log_likelihood(flat).mean())
    assert math.isclose(mean_elbo(model, x), best, rel_tol=0.01)
    assert mean_elbo(model, x) < best + 0.005
    assert active_units(model.encode(x).latent_dist.mode().flatten(1)).all()


@pytest.mark.parametrize(("variance", "kept"), [(1.4, 2), (0.7, 3)])
def test_dimensions_whose_eigenvalue_is_below_the_noise_collapse(variance, kept):
    x = images()
    flat, model = x.flatten(1), trained(x, 0.5 * math.log(variance))
    exact = probabilistic_pca(flat, LATENTS, variance)
    posterior = model.encode(x).latent_dist
    active = active_units(posterior.mode().flatten(1))
    assert int(active.sum()) == kept == int((covariance_eigenvalues(flat)[0] > variance).sum())
    rate = posterior.kl_map().mean(0).flatten()
    assert rate[~active].max() < 0.005 < 0.1 < rate[active].min()
    # the singular values of the decoder are those of W, (lambda - variance)^(1/2), and 0
    lengths = torch.linalg.svdvals(model.decoder.weight.double())
    torch.testing.assert_close(
        lengths, exact.weight.norm(dim=0).sort(descending=True)[0], rtol=0.03, atol=0.03
    )
    assert math.isclose(mean_elbo(model, x), float(exact.log_likelihood(flat).mean()), rel_tol=0.01)
