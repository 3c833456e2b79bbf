"""Metrics and pictures of held-out images, measured as by `kl-autoencoder evaluate`."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.image_io import DIFFERENCE_GAIN, difference_image, image_grid, save_image
from kl_autoencoder.evaluation.metrics import (
    LPIPS,
    LPIPS_SMALLEST,
    SSIM_WINDOW,
    from_8_bits,
    similarity,
    to_8_bits,
)

from ..config import Config


class HeldOut:
    """One rank's share of the held-out images: batches `rank`, `rank + ranks` ...; read once, kept as 8 bits.

    eight_bits: the batches, (B, C, R, R) uint8.
    """

    def __init__(self, photographs: Photographs, batch_size: int, rank: int = 0, ranks: int = 1):
        self.eight_bits: list[Tensor] = []
        self.labels: list[Tensor] = []  # (B,) int64 of each batch, where the images have classes
        for batch in photographs.batches(batch_size, rank, ranks):
            self.eight_bits.append(to_8_bits(torch.cat([one.image for one in batch])))
            if batch[0].label is not None:
                self.labels.append(torch.tensor([one.label for one in batch], dtype=torch.int64))

    def __len__(self) -> int:
        return sum(map(len, self.eight_bits))

    def batches(self) -> Iterator[Tensor]:
        """The batches, (B, C, R, R), float32 in [-1, 1]."""
        return map(from_8_bits, self.eight_bits)

    def first(self, images: int) -> Tensor:
        """The first `images` of the images, or all if there are fewer: (N, C, R, R), float32 in [-1, 1]."""
        return torch.stack(list(islice((image for batch in self.batches() for image in batch), images)))


def check_perceptual(config: Config) -> None:
    """Raise ValueError for crops so small that the perceptual term's network has no pixels in its last layers."""
    perceptual, side = config.loss.perceptual, min(config.data.resolutions)
    least = config.data.least_resolution(LPIPS_SMALLEST[perceptual.net])
    if perceptual.weight and side < least:
        raise ValueError(
            f"data.resolution: {side}; allowed: at least {least} with "
            f"loss.perceptual.net={perceptual.net}, or loss.perceptual.weight=0"
        )


def fitting_lpips(config: Config, lpips: LPIPS | None, say: Callable[[str], None]) -> LPIPS | None:
    """Return `lpips`, or None if the held-out images are too small; calls `say` with what is not measured."""
    data, net = config.data, config.validation.lpips_net
    side = data.held_out_side
    if side < SSIM_WINDOW:
        say(f"validation reports no SSIM: images of {side} pixels, its window has {SSIM_WINDOW}")
    if lpips is not None and side < LPIPS_SMALLEST[net]:
        say(f"validation reports no LPIPS: images of {side} pixels, {net} needs {LPIPS_SMALLEST[net]}")
        return None
    if data.channels == 4 and (lpips is not None or config.loss.perceptual.weight):
        say("LPIPS compares the colours alone, their transparency is left out")
    return lpips


@torch.no_grad()
def reconstruct(vae: KLAutoencoder, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> reconstructions from the posterior's mode, as float32 on the CPU."""
    return vae(images.to(vae.device, vae.dtype)).sample.float().cpu()


def measure(vae: KLAutoencoder, held_out: HeldOut, lpips: LPIPS | None) -> dict[str, list[float]]:
    """Name -> value for each image, between it and its reconstruction: PSNR (dB), SSIM and, with `lpips`, LPIPS.

    See `kl_autoencoder.evaluation.metrics.similarity`.
    """
    values: dict[str, list[float]] = {}
    for images in held_out.batches():
        for name, of_batch in similarity(reconstruct(vae, images), images, lpips).items():
            values.setdefault(name, []).extend(of_batch)
    return values


def save_pictures(path: Path, vae: KLAutoencoder, images: Tensor) -> None:
    """Write a grid to `path`, a row for each of `images` (B, C, H, W): original, reconstruction, difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reconstructions = torch.cat([reconstruct(vae, image) for image in images.split(1)])
    columns = [images, reconstructions, difference_image(images, reconstructions)]
    save_image(image_grid(columns, ["original", "reconstruction", f"difference x{DIFFERENCE_GAIN:g}"]), path)
