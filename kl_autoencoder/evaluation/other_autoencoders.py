"""Other autoencoders of diffusers (TAESD, DC-AE, VQ models ...) as methods, to compare them with ours."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple
from .methods import Reproduction, Row

PROBE = 256  # side in pixels of the black image that is encoded to learn the shape of the latents


def load_other(folder: Path | str, kind: str, subfolder: str | None = None) -> Any:
    """Load an autoencoder from a folder or hub id; `kind` is its class in diffusers. No pickled file is read."""
    return getattr(diffusers, kind).from_pretrained(folder, subfolder=subfolder, use_safetensors=True)


class OtherAutoencoder:
    """A method: an autoencoder of diffusers with the usual `encode` and `decode` of RGB images in [-1, 1].

    Decodes the posterior's mode, or the latents of a model without a posterior; statistics of latents are not
    taken. ConsistencyDecoderVAE's decoder, which draws noise, is seeded with `seed` + the image's number.
    `bits_per_pixel` counts 8 bits per latent value, as in `Model`, also for a code book, whose codes take less.
    Raises ValueError if the model does not map RGB images to latents (B, C, h, w) and back.
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
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w); classes return them under different names."""
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode()
        return next(getattr(encoded, name) for name in ("latents", "latent") if hasattr(encoded, name))

    def decode(self, z: Tensor, seed: int) -> Tensor:
        """Latents (1, C, h, w) -> image (1, 3, H, W), float32 on the CPU."""
        draws = isinstance(self.vae, diffusers.ConsistencyDecoderVAE)
        noise = {"generator": torch.Generator(self.vae.device).manual_seed(seed)} if draws else {}
        return self.vae.decode(z, **noise).sample.float().cpu()
