"""Change and decode latents: add noise, interpolate, add an attribute, draw from a Gaussian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple
from ..evaluation.metrics import as_saved
from ..latents import interpolation
from ..models.autoencoder_kl import ExactAutoencoder
from ..networks.distributions import DiagonalGaussian


@torch.inference_mode()
def encode(vae: ExactAutoencoder, images: Tensor) -> DiagonalGaussian:
    """Encode images (B, 3, H, W) in [-1, 1], padded to multiples of f: the posterior, float32 on the CPU."""
    padded = pad_to_multiple(images, vae.size_multiple).to(vae.device, vae.dtype)
    return DiagonalGaussian(vae.encode(padded).latent_dist.parameters.float().cpu())


@torch.inference_mode()
def decode(vae: ExactAutoencoder, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], rounded to 8 bits and cropped to `size` (H, W).

    They are decoded one at a time.
    """
    images = [vae.decode(z.to(vae.device, vae.dtype)).sample.float().cpu() for z in latents.split(1)]
    height, width = size or images[0].shape[2:]
    return as_saved(torch.cat(images)[:, :, :height, :width])


def noisy(z: Tensor, level: float, seed: int) -> Tensor:
    """z + level * s * e: (1, C, h, w), with e ~ N(0, I) and s the standard deviation of each channel of z."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return z + level * z.std(dim=(2, 3), keepdim=True, correction=0) * noise


def between(a: Tensor, b: Tensor, place: float, spherical: bool) -> Tensor:
    """Interpolate between latents `a` (`place` 0) and `b` (`place` 1), both (1, C, h, w), linearly or by slerp."""
    way = interpolation.slerp if spherical else torch.lerp
    return way(a[0], b[0], place)[None]


def attribute(plus: Sequence[DiagonalGaussian], minus: Sequence[DiagonalGaussian]) -> Tensor:
    """The direction of an attribute: mean latents with it minus mean latents without it, (1, C, h, w)."""
    return interpolation.mean_latent(plus) - interpolation.mean_latent(minus)


def draws(gaussian: DiagonalGaussian, count: int, seed: int) -> Tensor:
    """Draw latents (count, C, h, w) from a Gaussian over (1, C, h, w), such as the prior; draw i by `seed` + i."""
    return torch.cat([gaussian.sample(torch.Generator().manual_seed(seed + i)) for i in range(count)])
