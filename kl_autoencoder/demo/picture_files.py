"""The pictures that the page shows: PNG files under names that cannot be guessed; new ones replace the oldest."""

import secrets
import threading
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.image_io import tensor_to_images

MOST_BYTES = 1 << 30  # on disk, for the pictures of all visitors together


class PictureFiles:
    """Picture files in `folder`: `add` writes one and returns its name, `path` finds it by name. Thread-safe.

    If the files exceed `most_bytes`, the oldest are deleted, but never the last.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self.folder, self.most_bytes = folder, most_bytes
        self._sizes: dict[str, int] = {}  # by name, the oldest first
        self._lock = threading.Lock()

    def add(self, image: Tensor | Image.Image) -> str:
        """Write an image (1, 3, H, W) in [-1, 1], or a PIL image, as PNG, and return the file's name."""
        picture = image if isinstance(image, Image.Image) else tensor_to_images(image)[0]
        name = f"{secrets.token_urlsafe(18)}.png"
        path = self.folder / name
        picture.save(path, compress_level=1)  # three times as fast as the default, with a tenth more bytes
        with self._lock:
            self._sizes[name] = path.stat().st_size
            self._remove_oldest()
        return name

    def path(self, name: str) -> Path | None:
        """The path of the picture with this name; None if there is none, or none any more."""
        with self._lock:
            return self.folder / name if name in self._sizes else None

    def _remove_oldest(self) -> None:
        while sum(self._sizes.values()) > self.most_bytes and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            (self.folder / oldest).unlink(missing_ok=True)
