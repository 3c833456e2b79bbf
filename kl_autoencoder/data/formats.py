"""File formats: suffixes that are read as images, how each is written, and the key that marks a file of latents."""

from pathlib import Path
from typing import Any

LATENTS_KEY = "kl_autoencoder.latents"  # metadata key of the .safetensors files that hold latents
# A folder is searched for files with these suffixes, and a file given by name must have one of them. AVIF, HEIC and
# JPEG 2000 can be read only if the installed Pillow supports them.
READABLE = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".tga",
    ".avif", ".heic", ".heif", ".jp2",
)  # fmt: skip
# Suffix -> options of Pillow's `save`: JPEG at quality 95 without chroma subsampling, all others without loss.
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
