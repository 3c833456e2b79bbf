"""`compress` and `decompress`: an image to a few kilobytes and back."""

import os
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..data.image_io import image_size
from ..models.autoencoder_kl import ExactAutoencoder
from ..models.classes import class_of
from ..models.packaged import COMPACT_CODEC, packaged
from . import container
from .codec import Codec, Photograph, bytes_of
from .context_model import ContextModel
from .steps import DEFAULT_QUALITY


def compress(
    image: Photograph,
    quality: int | None = None,
    *,
    max_bytes: int | None = None,
    bits_per_pixel: float | None = None,
    model: str | os.PathLike | ExactAutoencoder = COMPACT_CODEC.name,
) -> bytes:
    """Compress an image to the bytes of a file that `decompress` reads.

    The image may have any size: it is padded by reflection for the network, and the padding is cropped again. As in
    `load_image` it is turned upright, its colour profile is converted to sRGB, transparency is composited over
    white, and 16 bits are rounded to 8; profile, alpha and EXIF are not kept.

    Args:
        image: a file, a PIL image, or a tensor (3, H, W) or (1, 3, H, W) in [-1, 1].
        quality: 1 to 100, by default 40; raising it by 16 halves the step to which latents are rounded.
        max_bytes, bits_per_pixel: choose the best quality that fits, instead of a given one.
        model: "compact-codec", "compact", a folder, a hub id, or an autoencoder in evaluation mode. Decoding needs
            the same model.

    Raises ValueError if more than one of quality, max_bytes and bits_per_pixel is given, for values out of range
    and for limits that no quality meets; and the errors of `load_image`.
    """
    if sum(value is not None for value in (quality, max_bytes, bits_per_pixel)) > 1:
        raise ValueError("quality, max_bytes and bits_per_pixel: one of them")
    codec = codec_of(model)
    if bits_per_pixel is not None:
        max_bytes = bytes_of(bits_per_pixel, _size(image))
    if max_bytes is not None:
        return codec.compress_to(image, max_bytes)
    return codec.compress(image, DEFAULT_QUALITY if quality is None else quality)


def decompress(data: bytes, model: str | os.PathLike | ExactAutoencoder | None = None) -> Image.Image:
    """Decompress the bytes of `compress` to an RGB image in sRGB, of its original size.

    model: the one that compressed it; None for those that come with the package, which a file names. Raises
    ValueError for bytes that are damaged, truncated or of another format, and for those of another model.
    """
    header, _ = container.unpack(data)  # raises for damaged data before the model is loaded
    return codec_of(container.model_for(header) if model is None else model).decompress(data)


def codec_of(model: str | os.PathLike | ExactAutoencoder) -> Codec:
    """The codec of an autoencoder, given itself or by name; the last two loaded by name are kept."""
    if isinstance(model, ExactAutoencoder):
        source = Path(model.config.get("_name_or_path") or "a model")
        return Codec(model, source.name, ContextModel.beside(source))
    return _loaded(os.fspath(model))


@lru_cache(maxsize=2)
def _loaded(name: str) -> Codec:
    source = packaged(name)
    vae = class_of(source).from_pretrained(source).float()
    return Codec(vae, Path(name).name, ContextModel.beside(source))


def _size(image: Photograph) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return tuple(image.shape[-2:]) if hasattr(image, "shape") else image_size(image)
