"""Encode the images of a source to grids of codes of a discrete autoencoder, once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.sources import Keys, image_keys, open_source

from ..config import CodePriorConfig
from ..data.labels import ClassOutOfRange, Source, labels_of_rows
from ..data.rows import digest_of
from ..data.training_data import HELD_OUT, split_rows
from ..loop.context import RunContext

AT_ONCE = 16  # images a batch: the same ones on any number of ranks, so that results are rounded alike
TRAIN, VALIDATION = Keys("data.train", "data.image_column"), Keys("data.validation", "data.image_column")


@dataclass(frozen=True)
class Codes:
    """The codes of N images, grids (N, h, w) int64, and their labels (N,) int64, None without classes."""

    grids: Tensor
    labels: Tensor | None

    def rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """A batch of the images `numbers`: "codes" (B, h, w) and, with classes, "labels" (B,)."""
        chosen = torch.from_numpy(numbers)
        labels = {} if self.labels is None else {"labels": self.labels[chosen]}
        return {"codes": self.grids[chosen], **labels}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """All images in order, in batches of `size`, the last of which may be smaller."""
        return [
            self.rows(np.arange(i, min(i + size, len(self.grids)))) for i in range(0, len(self.grids), size)
        ]


class EncodedImages:
    """The images of a run, encoded to codes: `trained`, `held_out`, and `found`, a fingerprint of the source.

    Raises ValueError or FileNotFoundError, which names the key, for a source that cannot be used.
    """

    def __init__(self, config: CodePriorConfig, autoencoder: Any, run: RunContext):
        self.config, self.autoencoder, self.run = config.data, autoencoder, run
        data, kept = config.data, [config.data.label_column] if config.data.label_column else []
        images = open_source(data.train, TRAIN, data.image_column, data.split, keep=kept)
        source = Source(data.train, data.image_column, data.label_column, data.labels == "folders")
        self.labels = labels_of_rows(source, images, config.model.classes)
        rows, held_out = split_rows(data, images)
        self.trained = self._encode(images, rows, data.train, "data.train")
        names = image_keys(images, data.image_column, data.train, most_read=64)
        self.found = {"images": len(images), "sha256": digest_of(names)}
        if data.validation is None:
            self.held_out = self._encode(images, held_out, data.train, "data.validation_images")
            return
        split = data.validation_split
        others = open_source(
            data.validation, VALIDATION, data.image_column, split, samples="validation", keep=kept
        )
        rows = np.arange(len(others))[: data.validation_images or HELD_OUT]
        self.held_out = self._encode(others, rows, data.validation, "data.validation")

    def _encode(self, images: Any, rows: np.ndarray, source: str, key: str) -> Codes:
        """Encode the images in `rows`, in this order.

        Unreadable images are left out, and in a run with classes also images without a class. Each batch is encoded
        by one of the ranks. With `horizontal_flip` each image is followed by its mirror image. Raises ValueError,
        which names `key`, if no image is left.
        """
        side = self.config.resolution or self.autoencoder.config.sample_size
        channels, column = self.autoencoder.config.in_channels, self.config.image_column
        squares = Photographs(images, source, side, column, rows, smallest=1, channels=channels)
        here: dict[int, list[Tensor]] = {}
        for batch in squares.batches(AT_ONCE, self.run.rank, self.run.ranks):
            pixels = torch.cat([one.image for one in batch])
            views = (pixels, pixels.flip(-1)) if self.config.horizontal_flip else (pixels,)
            for view in map(self._codes, views):
                for one, grid in zip(batch, view, strict=True):
                    here.setdefault(one.number, []).append(grid)
        everywhere: dict[int, list[Tensor]] = {}
        for share in gather_object([here]):
            everywhere |= share
        labels = {number: self._label(images[int(rows[number])]) for number in sorted(everywhere)}
        used = [number for number, label in labels.items() if label is not None]
        if not used:
            raise ValueError(f"{key}: no readable images in {source}; allowed: a source with some")
        views = len(everywhere[used[0]])
        grids = torch.stack([grid for number in used for grid in everywhere[number]])
        repeated = torch.tensor([labels[number] for number in used for _ in range(views)])
        return Codes(grids, None if self.labels is None else repeated)

    @torch.no_grad()
    def _codes(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> codes (B, h, w) int64, on the CPU."""
        model = self.autoencoder
        return model.encode_indices(images.to(model.device, model.dtype)).cpu()

    def _label(self, row: dict) -> int | None:
        """The class of an image; 0 in a run without classes, None if the image has none of the known classes."""
        if self.labels is None:
            return 0
        try:
            return self.labels({"path": row[self.config.image_column].get("path"), "columns": row})
        except ClassOutOfRange:
            raise
        except ValueError:
            return None
