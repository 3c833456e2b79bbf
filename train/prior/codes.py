"""Images of a source as grids of codes of a discrete autoencoder, encoded once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.sources import Keys, image_keys, open_source

from ..config import CodePriorConfig
from ..data.rows import RowBatches, digest_of
from ..data.training_data import split_rows
from ..loop.context import RunContext

AT_ONCE = 16  # images; the same ones on any number of ranks, so that none is rounded otherwise
TRAIN, VALIDATION = Keys("data.train", "data.image_column"), Keys("data.validation", "data.image_column")


@dataclass(frozen=True)
class Codes:
    """The codes (N, h, w) of N images, int64, and their labels (N,) where they have any."""

    grids: Tensor
    labels: Tensor | None

    def rows(self, numbers: np.ndarray) -> dict[str, Tensor]:
        chosen = torch.from_numpy(numbers)
        labels = {} if self.labels is None else {"labels": self.labels[chosen]}
        return {"codes": self.grids[chosen], **labels}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        return [
            self.rows(np.arange(i, min(i + size, len(self.grids)))) for i in range(0, len(self.grids), size)
        ]


class CodeData:
    """The codes of a run: `train`, batches of the training images; `held_out`, those of the held-out ones.

    Raises ValueError or FileNotFoundError naming the key for a source that cannot be used.
    """

    def __init__(self, config: CodePriorConfig, autoencoder: Any, run: RunContext):
        self.config, self.autoencoder, self.run = config.data, autoencoder, run
        self.classes = config.model.classes
        data, kept = config.data, [config.data.label_column] if config.data.label_column else []
        images = open_source(data.train, TRAIN, data.image_column, data.split, keep=kept)
        rows, held_out = split_rows(data, images)
        trained = self._encode(images, rows, data.train)
        if not len(trained.grids):
            raise ValueError(f"data.train: no readable images in {data.train}")
        if data.validation is not None:
            source, split = data.validation, data.validation_split
            others = open_source(
                source, VALIDATION, data.image_column, split, samples="validation", keep=kept
            )
            self.held_out = self._encode(others, np.arange(len(others))[: data.validation_images], source)
        else:
            self.held_out = self._encode(images, held_out, data.train)
        if not len(self.held_out.grids):
            raise ValueError(f"data.validation: no readable images in {data.validation or data.train}")
        names = image_keys(images, data.image_column, data.train, most_read=64)
        found = {"images": len(images), "sha256": digest_of(names)}
        order = np.arange(len(trained.grids))
        self.train = RowBatches(trained.rows, order, data.batch_size, config.seed, found)

    def _encode(self, images: Any, rows: np.ndarray, source: str) -> Codes:
        """The codes of all images that can be read, each batch by one of the ranks."""
        side = self.config.resolution or self.autoencoder.config.sample_size
        channels, column = self.autoencoder.config.in_channels, self.config.image_column
        squares = Photographs(images, source, side, column, rows, smallest=1, channels=channels)
        here = {}
        for batch in squares.batches(AT_ONCE, self.run.rank, self.run.ranks):
            numbers = [one.number for one in batch]
            grids = [self._codes(torch.cat([one.image for one in batch]))]
            if self.config.horizontal_flip:
                grids.append(self._codes(torch.cat([one.image for one in batch]).flip(-1)))
            here |= {number: found for number, *found in zip(numbers, *grids, strict=True)}
        everywhere: dict[int, list[Tensor]] = {}
        for share in gather_object([here]):
            everywhere |= share
        order = sorted(everywhere)
        grids = [grid for number in order for grid in everywhere[number]]
        labels = None
        if self.config.label_column:
            of_rows = [images[int(rows[number])][self.config.label_column] for number in order]
            labels = self._checked_labels(
                [label for label in of_rows for _ in range(len(grids) // len(order))]
            )
        return Codes(torch.stack(grids) if grids else torch.zeros(0, 1, 1, dtype=torch.int64), labels)

    @torch.no_grad()
    def _codes(self, images: Tensor) -> Tensor:
        model = self.autoencoder
        return model.encode_indices(images.to(model.device, model.dtype)).cpu()

    def _checked_labels(self, labels: list[Any]) -> Tensor:
        for label in labels:
            if not isinstance(label, int) or not 0 <= label < self.classes:
                raise ValueError(
                    f"data.label_column: {label!r} in {self.config.label_column}; allowed: whole numbers below "
                    f"model.classes, {self.classes}"
                )
        return torch.tensor(labels)
