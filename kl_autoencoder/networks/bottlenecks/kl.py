"""The bottleneck of a variational autoencoder: latents drawn from a diagonal Gaussian."""

import math

import torch
from torch import Tensor

from ..distributions import DiagonalGaussian
from .base import Bottleneck, Code


class KLBottleneck(Bottleneck):
    """Latents drawn from a diagonal Gaussian q(z|x) by reparameterisation (Kingma & Welling 2013, section 2.4).

    Its penalty is KL(q(z|x) || N(0, I)) per pixel dimension.

    Args:
        free_bits: smallest KL that a channel is counted with, in bits a latent value (see `kl_per_dimension`).
    """

    def __init__(self, free_bits: float = 0.0):
        super().__init__()
        self.free_bits = free_bits

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of the standard normal noise for one image: that of its latents, (C, h, w)."""
        return latent

    def forward(self, moments: Tensor, noise: Tensor, dimensions: int) -> Code:
        """Moments (B, 2C, h, w), noise (B, C, h, w), D = `dimensions` pixel values an image -> Code."""
        posterior = DiagonalGaussian(moments)
        z = posterior.mean + posterior.std * noise
        penalties = {"kl": kl_per_dimension(posterior, dimensions, self.free_bits)}
        return Code(z.to(posterior.mean.dtype), penalties, lambda: posterior_summary(posterior))


def kl_per_dimension(posterior: DiagonalGaussian, image_dimensions: int, free_bits: float = 0.0) -> Tensor:
    """KL(q(z|x) || N(0, I)) in nats, summed over an image's latents and divided by D: (B,), float32 or better.

    image_dimensions: D, the number of values (pixels times channels) of an image.
    free_bits: a channel with a KL below this many bits a latent value counts as if it had that much, and has no
        gradient (Kingma et al. 2016, appendix C.8). Applied to each image by itself, so that a batch may be split
        over ranks.
    """
    channels = posterior.kl_map().mean(dim=(2, 3))  # nats a latent value, (B, C)
    if free_bits:
        channels = channels.clamp(min=free_bits * math.log(2))
    positions = posterior.mean.shape[2] * posterior.mean.shape[3]
    return channels.sum(dim=1) * (positions / image_dimensions)


@torch.no_grad()
def posterior_summary(posterior: DiagonalGaussian) -> dict[str, Tensor]:
    """Return scalars, as tensors, that show whether a posterior has collapsed or diverged.

    A channel counts as active if its KL is above 0.01 nats a latent value; below, it carries hardly any
    information. (Burda et al. 2016 call a unit active if the variance of its mean is above 0.01.)
    """
    kl = posterior.kl_map().mean(dim=(0, 2, 3))  # nats a latent value, (C,)
    mean = posterior.mean.float()
    return {
        "latents/mean": mean.mean(),
        "latents/std": mean.std(),
        "latents/logvar": posterior.logvar.float().mean(),
        "latents/active_channels": (kl > 0.01).sum(),
        **{f"latents/kl_channel_{i}": value for i, value in enumerate(kl)},
    }
