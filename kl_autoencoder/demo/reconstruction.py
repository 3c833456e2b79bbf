"""Reconstruct a photograph by every model, and by JPEG and WebP at equal size: images, metrics and costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec.codec import Codec
from ..data.image_io import image_to_tensor, pad_to_multiple
from ..evaluation import baselines
from ..evaluation.metrics import LPIPS, as_saved, similarity
from ..models.autoencoder_kl import ExactAutoencoder
from ..models.large_images import prepare_for
from .measuring import Meter

CODECS = {"JPEG": "JPEG", "WEBP": "WebP"}  # Pillow's name -> usual name
DEFAULT_LPIPS = "alex"  # the net of the paper's metric and of `evaluate`


class Costs(NamedTuple):
    """Costs of encoding and decoding; `peak_bytes` is the larger of the two, as measured by `Meter`."""

    encode_ms: float
    decode_ms: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Outcome:
    """A photograph as reproduced by a method.

    images: (1, 3, H, W), 8-bit values in [-1, 1]. bytes: of the latents at 8 bits per value, or of the file.
    values: psnr (dB), ssim and, if LPIPS could be loaded, lpips. costs: of a model. latents: (1, C, h, w), of a
    model.
    """

    name: str
    detail: str
    images: Tensor
    bytes: int
    values: dict[str, float]
    costs: Costs | None = None
    latents: Tensor | None = None


def load_lpips(device: torch.device) -> LPIPS | None:
    """Load LPIPS; None, without a message, if its backbone is neither on this machine nor can be downloaded."""
    try:
        return LPIPS(DEFAULT_LPIPS).to(device)
    except OSError:
        return None


def compare(models: Mapping[str, ExactAutoencoder], images: Tensor, lpips: LPIPS | None) -> Iterator[Outcome]:
    """Reconstruct `images` (1, 3, H, W) in [-1, 1] by every model, then by JPEG and WebP at the models' sizes.

    These sizes are the bytes of each model's latents at 8 bits per value; equal ones count once. Raises ValueError
    for a photograph that does not fit into memory.
    """
    sizes: dict[int, str] = {}
    for name, vae in models.items():
        outcome = reconstruct(name, vae, images, lpips)
        sizes.setdefault(outcome.bytes, name)
        yield outcome
    for size, name in sizes.items():
        for kind in CODECS:
            like = f" like {name}" if len(sizes) > 1 else ""
            yield _coded(kind, like, images, size, lpips)


@torch.inference_mode()
def reconstruct(name: str, vae: ExactAutoencoder, images: Tensor, lpips: LPIPS | None) -> Outcome:
    """Encode to the posterior's mode and decode; large photographs in exact strips, like the command `reconstruct`.

    Raises ValueError if the photograph does not fit into memory.
    """
    height, width = images.shape[2:]
    try:
        prepare_for(vae, height, width)
    except ValueError as error:
        said = str(error).partition(";")[0]
        raise ValueError(f"{name}: {said}; choose a smaller longest side") from error
    padded = pad_to_multiple(images, vae.size_multiple).to(vae.device, vae.dtype)
    with Meter(vae.device) as encoding:
        latents = vae.encode(padded).latent_dist.mode()
    with Meter(vae.device) as decoding:
        decoded = vae.decode(latents).sample
    seen = as_saved(decoded[:, :, :height, :width].float().cpu())
    peaks = [meter.peak_bytes for meter in (encoding, decoding) if meter.peak_bytes is not None]
    _, channels, rows, columns = latents.shape
    return Outcome(
        name,
        f"{channels} channels of {columns}x{rows}",
        seen,
        latents[0].numel(),
        _values(seen, images, lpips),
        Costs(1000 * encoding.seconds, 1000 * decoding.seconds, max(peaks, default=None)),
        latents.float().cpu(),
    )


def compress(name: str, codec: Codec, images: Tensor, quality: int, lpips: LPIPS | None) -> Iterator[Outcome]:
    """Compress `images` (1, 3, H, W) by a model at `quality`, 1 to 100, then by JPEG and WebP to as many bytes."""
    with Meter(codec.vae.device) as encoding:
        file = codec.compress(images, quality)
    with Meter(codec.vae.device) as decoding:
        seen = image_to_tensor(codec.decompress(file))[None]
    peaks = [meter.peak_bytes for meter in (encoding, decoding) if meter.peak_bytes is not None]
    costs = Costs(1000 * encoding.seconds, 1000 * decoding.seconds, max(peaks, default=None))
    bits = 8 * len(file) / (images.shape[2] * images.shape[3])
    detail = f"quality {quality}, {bits:.3f} bits a pixel"
    yield Outcome(name, detail, seen, len(file), _values(seen, images, lpips), costs)
    for kind in CODECS:
        yield _coded(kind, "", images, len(file), lpips)


def _coded(kind: str, like: str, images: Tensor, size: int, lpips: LPIPS | None) -> Outcome:
    """The outcome of JPEG or WebP with at most `size` bytes; `like` is appended to its name."""
    decoded, (found,) = baselines.codec(images, kind, size)
    detail = "at most as many bytes" if found <= size else "its smallest file"
    return Outcome(f"{CODECS[kind]}{like}", detail, decoded, found, _values(decoded, images, lpips))


def _values(images: Tensor, references: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    return {key: value for key, (value,) in similarity(images, references, lpips).items()}
