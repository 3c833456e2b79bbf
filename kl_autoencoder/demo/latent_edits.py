"""Latents changed and decoded: with noise, between two photographs, along an attribute, drawn from a Gaussian."""

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
    """The posterior of images (B, 3, H, W), padded to what the model takes; float32 on the CPU."""
    padded = pad_to_multiple(images, vae.size_multiple).to(vae.device, vae.dtype)
    return DiagonalGaussian(vae.encode(padded).latent_dist.parameters.float().cpu())


@torch.inference_mode()
def decode(vae: ExactAutoencoder, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) of 8 bits in [-1, 1], one at a time; cropped to `size`."""
    images = [vae.decode(z.to(vae.device, vae.dtype)).sample.float().cpu() for z in latents.split(1)]
    height, width = size or images[0].shape[2:]
    return as_saved(torch.cat(images)[:, :, :height, :width])


def noisy(z: Tensor, level: float, seed: int) -> Tensor:
    """z + level * s * e: (1, C, h, w), e ~ N(0, I), s each channel's standard deviation over the photograph."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return z + level * z.std(dim=(2, 3), keepdim=True, correction=0) * noise


def between(a: Tensor, b: Tensor, place: float, spherical: bool) -> Tensor:
    """Latents (1, C, h, w) twice -> at `place` of the way from `a` (0) to `b` (1), straight or along an arc."""
    way = interpolation.slerp if spherical else torch.lerp
    return way(a[0], b[0], place)[None]


def attribute(plus: Sequence[DiagonalGaussian], minus: Sequence[DiagonalGaussian]) -> Tensor:
    """What the latents of photographs with an attribute have more than those without, on average: (1, C, h, w)."""
    return interpolation.mean_latent(plus) - interpolation.mean_latent(minus)


def draws(gaussian: DiagonalGaussian, count: int, seed: int) -> Tensor:
    """(count, C, h, w) from a Gaussian of one image's latents, such as the prior; number i with `seed` + i."""
    return torch.cat([gaussian.sample(torch.Generator().manual_seed(seed + i)) for i in range(count)])
