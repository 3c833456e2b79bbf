"""The methods that `evaluate` compares: autoencoders, and bicubic, JPEG and WebP as baselines.

A method has `rows`, its lines of the table, and `reproduce`, which yields the images of each row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple
from ..models.autoencoder_kl import KLAutoencoder
from ..networks.distributions import DiagonalGaussian
from . import baselines

if TYPE_CHECKING:
    from .other_autoencoders import OtherAutoencoder

LATENTS = ("mode", "sample")
FORMATS = {"JPEG": "JPEG", "WEBP": "WebP", "AVIF": "AVIF"}  # PIL's names, and people's
NATS_PER_BIT = 0.6931471805599453  # ln 2


@dataclass(frozen=True)
class Row:
    """A line of the table. `key` names it in metrics.json and images.csv."""

    key: str
    name: str
    detail: str
    kind: str  # model, baseline or codec
    latents: str | None = None  # mode or sample
    dtype: str | None = None

    def about(self) -> dict[str, str | None]:
        return {name: value for name, value in asdict(self).items() if name != "key"}


class Reproduction(NamedTuple):
    """What a method made of a batch of images."""

    row: Row
    images: Tensor  # (B, 3, H, W), float32 on the CPU, neither clamped nor rounded
    extras: dict[str, list[float]]  # measures of the way there, an entry an image
    posterior: DiagonalGaussian | None = None


class Model:
    """An autoencoder in one type: images decoded from the posterior's mode and from a sample of it.

    Image number i is sampled with `seed` + i; the noise is that of float32 in every type.
    """

    def __init__(self, name: str, vae: KLAutoencoder, seed: int):
        if vae.config.in_channels != 3 or vae.config.out_channels != 3:
            raise ValueError(f"{name}: a model of {vae.config.in_channels}-channel images; allowed: 3 (RGB)")
        self.name, self.vae, self.seed = name, vae, seed
        self.downsampling, self.latent_channels = vae.downsampling, vae.config.latent_channels
        dtype = str(vae.dtype).removeprefix("torch.")
        self.rows = [
            Row(f"{name}/{latents}/{dtype}", name, f"{latents}, {dtype}", "model", latents, dtype)
            for latents in LATENTS
        ]

    @torch.inference_mode()
    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        height, width = images.shape[2:]
        padded = pad_to_multiple(images, self.vae.downsampling).to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(padded).latent_dist
        exact = DiagonalGaussian(posterior.parameters.float())
        generators = [torch.Generator().manual_seed(self.seed + number) for number in numbers]
        bits = {
            "bits_per_pixel": [8 * exact.mean[0].numel() / (height * width)] * len(images),
            "kl_bits_per_pixel": (exact.kl().double() / (NATS_PER_BIT * height * width)).tolist(),
        }
        for row, z in zip(self.rows, (exact.mode(), exact.sample(generators)), strict=True):
            decoded = self.vae.decode(z.to(self.vae.dtype)).sample[:, :, :height, :width].float().cpu()
            broken = (~decoded.isfinite().all(dim=(1, 2, 3))).float().tolist()
            yield Reproduction(row, decoded, {**bits, "not_finite": broken}, posterior)


class Bicubic:
    """Images scaled down by `factor` and up again."""

    def __init__(self, factor: int):
        self.factor = factor
        self.rows = [Row(f"bicubic/f{factor}", "bicubic", f"down and up by {factor}", "baseline")]

    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        bits = [24 / self.factor**2] * len(images)
        yield Reproduction(self.rows[0], baselines.bicubic(images, self.factor), {"bits_per_pixel": bits})


class Codec:
    """JPEG or WebP, each image at most as large as its latents of 8 bits."""

    def __init__(self, kind: str, factor: int, channels: int):
        self.kind, self.factor, self.channels = kind, factor, channels
        name = FORMATS[kind]
        about = f"in the bytes of {channels} channels at 1/{factor}"
        self.rows = [Row(f"{name.lower()}/f{factor}c{channels}", name, about, "baseline")]

    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        height, width = images.shape[2:]
        size = -(-height // self.factor) * -(-width // self.factor) * self.channels
        decoded, sizes = baselines.codec(images, self.kind, size)
        bits = [8 * size / (height * width) for size in sizes]
        yield Reproduction(self.rows[0], decoded, {"bits_per_pixel": bits})


Method = "Model | Bicubic | Codec | OtherAutoencoder"


def baselines_of(models: "Sequence[Model | OtherAutoencoder]") -> list[Method]:
    """One of each for every factor, and for every number of bytes, that a model has."""
    shapes = sorted({(model.downsampling, model.latent_channels) for model in models})
    small = [Bicubic(factor) for factor in sorted({factor for factor, _ in shapes}) if factor > 1]
    return [*small, *(Codec(kind, *shape) for shape in shapes for kind in ("JPEG", "WEBP"))]


def short_names(given: Sequence[str]) -> list[str]:
    """The shortest ends of the models' paths that tell them apart; `export` and `vae` say nothing.

    ValueError if a model is given twice.
    """
    if len(set(given)) < len(given):
        raise ValueError(f"--model: {', '.join(given)}; allowed: each model once")
    parts = []
    for name in given:
        words = [word for word in Path(name).parts if word not in ("/", ".", "..")] or [name]
        parts.append(words[:-1] if len(words) > 1 and words[-1] in ("export", "vae") else words)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(words[-length:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    return [str(name).strip("/").replace("/", "-") for name in given]
