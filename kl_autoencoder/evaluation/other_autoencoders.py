"""Other autoencoders of diffusers, to be compared with ours in one table: TAESD, DC-AE, VQ models and the like."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple
from .methods import Reproduction, Row

PROBE = 256  # pixels a side of the image that tells the shape of the latents


def load_other(folder: Path | str, kind: str, subfolder: str | None = None) -> Any:
    """A folder (or hub id) that holds diffusers' class `kind` -> the model. No pickled file is read."""
    return getattr(diffusers, kind).from_pretrained(folder, subfolder=subfolder, use_safetensors=True)


class OtherAutoencoder:
    """An autoencoder of diffusers with the usual `encode` and `decode` of images in [-1, 1]; latents by their mode.

    Only what is decoded is measured: its latents need not have a posterior. A decoder that draws noise (of
    ConsistencyDecoderVAE) is seeded with `seed` + the image's number. ValueError if it is not one of RGB images.

    `bits_per_pixel` counts 8 bits a latent value, as for `Model`, also for those of a codebook, which take less.
    """

    def __init__(self, name: str, vae: Any, seed: int):
        self.name, self.vae, self.seed = name, vae, seed
        with torch.inference_mode():
            z = self.encode(torch.zeros(1, 3, PROBE, PROBE))
        if z.ndim != 4 or PROBE % z.shape[2] or self.decode(z[:1], 0).shape != (1, 3, PROBE, PROBE):
            raise ValueError(f"{name}: its latents are {tuple(z.shape)}; allowed: autoencoders of RGB images")
        self.downsampling, self.latent_channels = PROBE // z.shape[2], z.shape[1]
        dtype = str(vae.dtype).removeprefix("torch.")
        detail = f"{type(vae).__name__}, {dtype}"
        self.rows = [Row(f"{name}/{dtype}", name, detail, "baseline", "mode", dtype)]

    @torch.inference_mode()
    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        height, width = images.shape[2:]
        latents = self.encode(pad_to_multiple(images, self.downsampling))
        decoded = torch.cat([
            self.decode(z, self.seed + number) for z, number in zip(latents.split(1), numbers, strict=True)
        ])[:, :, :height, :width]  # fmt: skip
        broken = (~decoded.isfinite().all(dim=(1, 2, 3))).float().tolist()
        bits = [8 * latents[0].numel() / (height * width)] * len(images)
        yield Reproduction(self.rows[0], decoded, {"bits_per_pixel": bits, "not_finite": broken})

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), by whatever name the class gives them."""
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode()
        return next(getattr(encoded, name) for name in ("latents", "latent") if hasattr(encoded, name))

    def decode(self, z: Tensor, seed: int) -> Tensor:
        """Latents (1, C, h, w) -> the image, float32 on the CPU."""
        draws = isinstance(self.vae, diffusers.ConsistencyDecoderVAE)
        noise = {"generator": torch.Generator(self.vae.device).manual_seed(seed)} if draws else {}
        return self.vae.decode(z, **noise).sample.float().cpu()
