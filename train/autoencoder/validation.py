"""Metrics and pictures on held-out images."""

from pathlib import Path

import torch
from torch import Tensor

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.data.image_io import difference_image, image_grid, save_image
from kl_autoencoder.evaluation.metrics import LPIPS, psnr, ssim


@torch.no_grad()
def reconstruct(vae: KLAutoencoder, images: Tensor, batch_size: int) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> their reconstructions from the posterior's mode, on the CPU, float32."""
    batches = images.to(vae.dtype).split(batch_size)
    return torch.cat([vae(batch.to(vae.device)).sample.float().cpu() for batch in batches])


@torch.no_grad()
def measure(
    reconstructions: Tensor, images: Tensor, lpips: LPIPS | None, batch_size: int
) -> dict[str, Tensor]:
    """PSNR (dB), SSIM and, where there is one, LPIPS of each image: name -> (N,), float64."""
    values = {"psnr": psnr(reconstructions, images), "ssim": ssim(reconstructions, images)}
    if lpips is not None:
        device = next(lpips.parameters()).device
        pairs = zip(reconstructions.clamp(-1, 1).split(batch_size), images.split(batch_size), strict=True)
        values["lpips"] = torch.cat([lpips(a.to(device), b.to(device)).double().cpu() for a, b in pairs])
    return values


def save_pictures(path: Path, images: Tensor, reconstructions: Tensor) -> None:
    """A grid with a row an image: original, reconstruction, difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [images, reconstructions, difference_image(images, reconstructions)]
    save_image(image_grid(columns, ["original", "reconstruction", "difference"]), path)
