"""DiagonalGaussian against torch.distributions and against what half precision does."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from kl_autoencoder import DiagonalGaussian

SHAPE = (3, 8, 5, 7)


def moments(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(parameters):
    mean, logvar = parameters.chunk(2, dim=1)
    return Independent(Normal(mean, (0.5 * logvar).exp()), 3)


def test_kl_and_nll_equal_torch_distributions():
    a, b = moments(0), moments(1)
    standard = reference(torch.zeros_like(a))
    torch.testing.assert_close(DiagonalGaussian(a).kl(), kl_divergence(reference(a), standard))
    torch.testing.assert_close(
        DiagonalGaussian(a).kl(DiagonalGaussian(b)), kl_divergence(reference(a), reference(b))
    )
    x = moments(2)[:, :4]
    torch.testing.assert_close(DiagonalGaussian(a).nll(x), -reference(a).log_prob(x))


def test_samples_have_the_stated_mean_and_deviation():
    wide = moments(3, torch.float32)[:1].expand(20_000, -1, -1, -1)
    posterior = DiagonalGaussian(wide)
    samples = posterior.sample(torch.Generator().manual_seed(0))
    mean, logvar = wide[0].chunk(2)
    std = (0.5 * logvar).exp()
    assert ((samples.mean(0) - mean).abs() < 5 * std / 20_000**0.5).all()
    torch.testing.assert_close(samples.std(0), std, rtol=0.03, atol=0)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_sample_is_reparameterised():
    """dz/dmean = 1 and dz/dlogvar = e * std / 2 for the noise e that was drawn."""
    parameters = moments(4).requires_grad_()
    posterior = DiagonalGaussian(parameters)
    z = posterior.sample(torch.Generator().manual_seed(5))
    z.sum().backward()
    grad_mean, grad_logvar = parameters.grad.chunk(2, dim=1)
    assert torch.equal(grad_mean, torch.ones_like(grad_mean))
    torch.testing.assert_close(grad_logvar, (z - posterior.mean).detach() / 2)


def test_logvar_is_clamped_and_stays_finite():
    extreme = torch.cat(
        [torch.zeros(1, 2, 2, 2), torch.tensor([-1e4, 1e4]).view(1, 2, 1, 1).expand(1, 2, 2, 2)], 1
    )
    posterior = DiagonalGaussian(extreme)
    assert posterior.logvar.amin() == -30 and posterior.logvar.amax() == 20
    assert posterior.kl().isfinite().all() and posterior.sample().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_of_a_large_image_in_half_precision(dtype):
    """At 512x512 the summed KL exceeds 65504, the largest half; the result is float32 and right."""
    parameters = (8 * torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(6))).to(dtype)
    kl = DiagonalGaussian(parameters).kl()
    exact = DiagonalGaussian(parameters.double()).kl()
    assert kl.dtype == torch.float32 and kl.item() > 65504
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)
    assert DiagonalGaussian(parameters).sample().dtype == dtype


def test_a_generator_an_image():
    parameters = moments(7)
    each = DiagonalGaussian(parameters).sample([torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    alone = DiagonalGaussian(parameters[1:2]).sample(torch.Generator().manual_seed(2))
    assert torch.equal(each[1:2], alone)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        DiagonalGaussian(parameters).sample([torch.Generator()] * 2)


def test_odd_channels_are_refused():
    with pytest.raises(ValueError, match="7 channels"):
        DiagonalGaussian(torch.zeros(1, 7, 2, 2))
