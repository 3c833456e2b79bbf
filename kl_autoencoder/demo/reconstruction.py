"""A photograph through every model, and through JPEG and WebP at equal bytes: images, figures, and what it cost."""

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

CODECS = {"JPEG": "JPEG", "WEBP": "WebP"}  # as Pillow names them, as people do
DEFAULT_LPIPS = "alex"  # what the paper measures with, as `evaluate` does


class Costs(NamedTuple):
    """Of encoding and decoding; `peak_bytes` as `Meter` has it, the larger of the two."""

    encode_ms: float
    decode_ms: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Outcome:
    """What a method made of a photograph.

    images: (1, 3, H, W) in [-1, 1], of 8 bits. bytes: of the latents at 8 bits a value, or of the file. values:
    psnr (dB), ssim and, where LPIPS could be loaded, lpips. latents: (1, C, h, w), of a model.
    """

    name: str
    detail: str
    images: Tensor
    bytes: int
    values: dict[str, float]
    costs: Costs | None = None
    latents: Tensor | None = None


def load_lpips(device: torch.device) -> LPIPS | None:
    """LPIPS if its backbone is on this machine or can be fetched; None, and no word, if not."""
    try:
        return LPIPS(DEFAULT_LPIPS).to(device)
    except OSError:
        return None


def compare(models: Mapping[str, ExactAutoencoder], images: Tensor, lpips: LPIPS | None) -> Iterator[Outcome]:
    """Reconstruct `images` (1, 3, H, W) by every model; then as JPEG and WebP, in the bytes of each one's latents.

    Raises ValueError for a photograph that does not fit into memory.
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
    """Encode to the posterior's mode and decode: large photographs in exact strips, as `reconstruct` does."""
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
    """Compress `images` (1, 3, H, W) to a file by a model, at a quality of 1 to 100; then by JPEG and WebP."""
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
    decoded, (found,) = baselines.codec(images, kind, size)
    detail = "at most as many bytes" if found <= size else "its smallest file"
    return Outcome(f"{CODECS[kind]}{like}", detail, decoded, found, _values(decoded, images, lpips))


def _values(images: Tensor, references: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    return {key: value for key, (value,) in similarity(images, references, lpips).items()}
