"""The diagonal Gaussian posterior q(z|x) of a variational autoencoder (Kingma & Welling 2013)."""

import math

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion; keeps exp(logvar) finite in float32


class DiagonalGaussian:
    """A normal distribution with a mean and a variance for every latent value of every image.

    moments: (B, 2C, h, w), the mean in the first half of the channels and the log-variance, which is clamped to
    [-30, 20], in the second. Raises ValueError for an odd number of channels.

    `mean`, `logvar`, `sample()` and `mode()` are (B, C, h, w) in the dtype of the moments. `std`, `var`, `kl()` and
    `nll()` are float32 or better, since they overflow in half precision. All are differentiable in the moments.
    """

    def __init__(self, moments: Tensor):
        if moments.shape[1] % 2:
            raise ValueError(
                f"moments: {moments.shape[1]} channels; allowed: an even number (mean and logvar)"
            )
        self.parameters = moments  # as diffusers' distribution names it
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * at_least_float32(self.logvar))

    @property
    def var(self) -> Tensor:
        return torch.exp(at_least_float32(self.logvar))

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Reparameterised draw z = mean + std * e, e ~ N(0, I) (Kingma & Welling 2013, section 2.4).

        generator: draws the noise, on its own device (so a CPU generator gives the same noise for every device). In
        a list, one for each image; raises ValueError if it has another length.
        """
        noise = _noise_like(self.mean, generator)
        return (self.mean + self.std * noise).to(self.mean.dtype)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other) in nats, summed over each image's latents: (B,). `other` defaults to N(0, I).

        Closed form, Kingma & Welling 2013, appendix B, and its generalisation to two Gaussians.
        """
        return self.kl_map(other).sum(dim=(1, 2, 3))

    def kl_map(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Return the terms whose sum is `kl()`: (B, C, h, w), in nats, float32 or better."""
        mean, logvar = at_least_float32(self.mean), at_least_float32(self.logvar)
        if other is None:
            return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        other_mean, other_logvar = at_least_float32(other.mean), at_least_float32(other.logvar)
        distance = (mean - other_mean).square() * torch.exp(-other_logvar)
        return 0.5 * (distance + torch.exp(logvar - other_logvar) - 1.0 - logvar + other_logvar)

    def nll(self, x: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood -log q(x) in nats of latents x (B, C, h, w), summed over `dims`: (B,)."""
        mean, logvar = at_least_float32(self.mean), at_least_float32(self.logvar)
        terms = math.log(2 * math.pi) + logvar + (at_least_float32(x) - mean).square() * torch.exp(-logvar)
        return 0.5 * terms.sum(dim=dims)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _noise_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(x):
            raise ValueError(
                f"generator: {len(generator)} generators for {len(x)} images; allowed: one an image"
            )
        return torch.cat([_noise_like(one, g) for one, g in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
