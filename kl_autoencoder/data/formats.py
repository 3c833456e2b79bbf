"""Kinds of files: which suffixes are read as images, how each is written, what marks a file of latents."""

from pathlib import Path
from typing import Any

LATENTS_KEY = "kl_autoencoder.latents"  # in the metadata of a .safetensors file: it holds latents
# The suffixes that a folder is searched for, and one of which a named file must have. AVIF, HEIC and JPEG 2000 are
# read where the installed Pillow can read them.
READABLE = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".tga",
    ".avif", ".heic", ".heif", ".jp2",
)  # fmt: skip
# Pillow's options for each suffix. JPEG at 95 without chroma subsampling; WebP and TIFF without loss.
WRITERS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
    ".tif": {"format": "TIFF", "compression": "tiff_deflate"},
    ".tiff": {"format": "TIFF", "compression": "tiff_deflate"},
    ".bmp": {"format": "BMP"},
}


def check_writable(path: Path) -> None:
    """Raise ValueError if a path's suffix is not that of an image format that can be written."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path}: unknown image suffix {path.suffix!r}, allowed are {', '.join(WRITERS)}")
