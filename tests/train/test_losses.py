"""The terms of the objective against torch.distributions and against an exactly solvable model."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, Normal

from kl_autoencoder import DiagonalGaussian
from kl_autoencoder.networks.bottlenecks import kl_per_dimension
from train.autoencoder.likelihoods import reconstruction_nll
from train.autoencoder.objective import weighted_kl
from train.config import KLConfig
from train.loop.schedules import ramp


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, torch.rand(
        2, 3, 8, 8, generator=generator
    ) * 2 - 1


def test_likelihoods_equal_torch_distributions():
    # inside the range where the Bernoulli probability is not clamped
    y, x = (0.99 * images for images in pair())
    log_scale = torch.tensor(-0.7)
    scale = log_scale.exp()
    expected = {
        "l1": (x - y).abs(),
        "l2": (x - y) ** 2,
        "laplace": -Laplace(y, scale).log_prob(x),
        "gaussian": -Normal(y, scale).log_prob(x),
        "bernoulli": -Bernoulli((y + 1) / 2).log_prob((x.sign() + 1) / 2),
    }
    for kind, value in expected.items():
        images = x.sign() if kind == "bernoulli" else x
        torch.testing.assert_close(
            reconstruction_nll(kind, y, images, log_scale), value, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["l1", "l2", "laplace", "gaussian", "bernoulli"])
def test_gradients_are_finite_and_go_where_they_should(kind):
    """Flat images, equal images and values far outside [-1, 1] too."""
    for y, x in [
        pair(),
        (torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)),
        (torch.full((1, 3, 4, 4), 7.0), torch.ones(1, 3, 4, 4)),
    ]:
        y, log_scale = y.clone().requires_grad_(), torch.zeros((), requires_grad=True)
        reconstruction_nll(kind, y, x, log_scale).mean().backward()
        assert y.grad.isfinite().all() and (y.grad != 0).any()
        learned = kind in ("laplace", "gaussian")
        assert (log_scale.grad is not None) == learned and (not learned or log_scale.grad.isfinite())


def test_the_learned_scale_is_best_at_the_residuals_own():
    """d/ds of the mean nll vanishes at the root mean square (Gaussian) or the mean absolute residual (Laplace)."""
    y, x = pair()
    for kind, best in (("gaussian", (x - y).square().mean().sqrt()), ("laplace", (x - y).abs().mean())):
        log_scale = best.log().requires_grad_()
        reconstruction_nll(kind, y, x, log_scale).mean().backward()
        assert log_scale.grad.abs() < 1e-5


def test_halves_are_computed_in_float32():
    y, x = pair()
    for kind in ("l1", "l2", "bernoulli"):
        half = reconstruction_nll(kind, y.bfloat16(), x.bfloat16())
        assert half.dtype == torch.float32
        assert torch.equal(half, reconstruction_nll(kind, y.bfloat16().float(), x.bfloat16().float()))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="'l3'; allowed: l1, l2"):
        reconstruction_nll("l3", *pair())


def test_kl_is_the_sum_over_an_image_a_dimension():
    moments = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(1))
    posterior = DiagonalGaussian(moments)
    torch.testing.assert_close(kl_per_dimension(posterior, 768), posterior.kl() / 768)


def test_free_bits_hold_a_channel_at_the_floor_without_gradient():
    """A channel at the prior (KL 0), one with 0.5 nats from a mean of 1: half a bit raises the first alone."""
    moments = torch.zeros(1, 4, 2, 2)
    moments[:, 1] = 1.0
    moments.requires_grad_()
    kl = kl_per_dimension(DiagonalGaussian(moments), 12, free_bits=0.5)
    torch.testing.assert_close(kl, torch.tensor([(0.5 * math.log(2) + 0.5) * 4 / 12]))
    kl.sum().backward()
    assert (moments.grad[:, 0] == 0).all() and (moments.grad[:, 1] != 0).all()


def test_the_elbo_never_exceeds_the_log_likelihood():
    """A linear-Gaussian model z ~ N(0, I), x = W z + s e has log p(x) in closed form.

    With the exact posterior the bound is tight; with any other it lies below. The expectation over z is taken
    over both signs of each draw, which is exact for the terms linear in z.
    """
    torch.manual_seed(0)
    dims, latent, s, draws = 12, 2, 0.3, 20_000
    # orthogonal: a diagonal posterior
    w = torch.linalg.qr(torch.randn(dims, latent))[0] * torch.tensor([1.5, 0.6])
    x = torch.randn(dims)
    exact = MultivariateNormal(torch.zeros(dims), w @ w.T + s**2 * torch.eye(dims)).log_prob(x)
    precision = (w**2).sum(0) / s**2 + 1
    best_mean, best_logvar = (w.T @ x) / s**2 / precision, -precision.log()

    def elbo(mean, logvar):
        posterior = DiagonalGaussian(torch.cat([mean, logvar]).view(1, 2 * latent, 1, 1))
        e = torch.randn(draws, latent)
        z = mean + torch.cat([e, -e]) * (0.5 * logvar).exp()
        images, decoded = x.view(1, 3, 2, 2).expand(2 * draws, -1, -1, -1), (z @ w.T).view(-1, 3, 2, 2)
        nll = reconstruction_nll("gaussian", decoded, images, torch.tensor(s).log()).mean()
        return -(nll + kl_per_dimension(posterior, dims).mean()) * dims

    assert elbo(best_mean, best_logvar).item() == pytest.approx(exact.item(), abs=0.03)
    for seed in range(8):
        torch.manual_seed(seed)
        assert elbo(best_mean + 0.5 * torch.randn(latent), best_logvar + torch.randn(latent)) < exact - 0.03


def test_ramp():
    assert [ramp(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(0, 0) == 1.0


# ------------------------------------------------------------------ the weight of the KL


def parts_of_the_loss(kl, steps, **values):
    config = KLConfig(weight=0.5, **values)
    return [weighted_kl(config, torch.tensor(kl), step, dimensions=100).item() for step in steps]


def test_the_weight_of_the_kl_rises_as_its_papers_say():
    """Linear (Bowman et al.), half a cosine, and in cycles (Fu et al. 2019, eq. 6, R = 1/2, cycles of 8 steps)."""
    assert parts_of_the_loss(2.0, (0, 1, 7)) == [1, 1, 1]
    assert parts_of_the_loss(2.0, range(6), warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [(1 - math.cos(math.pi * min(1, t / 4))) / 2 for t in range(6)]
    assert parts_of_the_loss(2.0, range(6), warmup_steps=4, warmup="cosine") == pytest.approx(cosine)
    cycles = [min(1, (t % 8) / 8 / 0.5) for t in range(24)]
    assert parts_of_the_loss(2.0, range(24), warmup_steps=4, cycle_steps=8) == pytest.approx(cycles)


def test_a_capacity_is_what_the_kl_is_drawn_to():
    """Burgess et al. 2018: C rises linearly; below it the gradient raises the KL, above it lowers it."""
    found = parts_of_the_loss(0.2, range(5), capacity=40.0, capacity_steps=4)  # C / D: 0, .1, .2, .3, .4
    assert found == pytest.approx([0.5 * abs(0.2 - 0.1 * t) for t in range(5)], abs=1e-7)
    for nats, sign in ((0.1, -1), (0.9, 1)):
        kl = torch.tensor(nats, requires_grad=True)
        weighted_kl(KLConfig(weight=2.0, capacity=40.0), kl, 0, dimensions=100).backward()
        assert kl.grad.item() == 2 * sign
