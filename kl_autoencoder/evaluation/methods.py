"""The methods that `evaluate` compares: autoencoders, and bicubic, JPEG and WebP as baselines.

A method has `rows`, its rows in the table, and `reproduce(images, numbers)`, which takes images (B, 3, H, W) in
[-1, 1] and their numbers in the data set and yields a `Reproduction` for each row.
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
FORMATS = {"JPEG": "JPEG", "WEBP": "WebP", "AVIF": "AVIF"}  # PIL's name -> usual name
NATS_PER_BIT = 0.6931471805599453  # ln 2


@dataclass(frozen=True)
class Row:
    """A row of the table. `key` identifies it in metrics.json and images.csv."""

    key: str
    name: str
    detail: str  # follows the name in the table
    kind: str  # model, baseline or codec
    latents: str | None = None  # mode or sample
    dtype: str | None = None

    def about(self) -> dict[str, str | None]:
        """All fields but `key`, as in metrics.json."""
        return {name: value for name, value in asdict(self).items() if name != "key"}


class Reproduction(NamedTuple):
    """A batch of images as a method reproduces them in one row of the table."""

    row: Row
    images: Tensor  # (B, 3, H, W), float32 on the CPU, neither clamped nor rounded
    extras: dict[str, list[float]]  # bits_per_pixel and the like -> a value for each image
    posterior: DiagonalGaussian | None = None


class Model:
    """An autoencoder in one type, with two rows: images decoded from the posterior's mode and from a sample.

    The sample of image i is drawn with `seed` + i in float32, so that the noise is the same in every type. Raises
    ValueError for a model of other than RGB images.
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
    """Baseline: images scaled down by `factor` and up again (`baselines.bicubic`)."""

    def __init__(self, factor: int):
        self.factor = factor
        self.rows = [Row(f"bicubic/f{factor}", "bicubic", f"down and up by {factor}", "baseline")]

    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        bits = [24 / self.factor**2] * len(images)
        yield Reproduction(self.rows[0], baselines.bicubic(images, self.factor), {"bits_per_pixel": bits})


class Codec:
    """Baseline: JPEG or WebP files no larger than 8-bit latents of `channels` channels at 1/`factor`."""

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
    """One `Bicubic` for each factor of the models, and JPEG and WebP for each shape of their latents."""
    shapes = sorted({(model.downsampling, model.latent_channels) for model in models})
    small = [Bicubic(factor) for factor in sorted({factor for factor, _ in shapes}) if factor > 1]
    return [*small, *(Codec(kind, *shape) for shape in shapes for kind in ("JPEG", "WEBP"))]


def short_names(given: Sequence[str]) -> list[str]:
    """Name models by the shortest ends of their paths that are unique; a last part `export` or `vae` is dropped.

    Raises ValueError if a model is given twice.
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
