"""`Latents`: a data set that `encode-dataset` wrote, normalised by the statistics that it records."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kl_autoencoder.latents.latent_dataset import LatentDataset, stored_latents
from kl_autoencoder.networks.distributions import DiagonalGaussian

from ..data.rows import RowBatches, digest_of, split_by_name
from ..data.training_data import HELD_OUT
from ..parts import Draws

# what a data set may hold: posteriors, draws of them, or their modes
CONTENTS = ("moments", "sample", "mode")


class Latents:
    """A data set of latents: `read` returns them as stored, `normalised` with mean 0 and deviation 1 a channel.

    folder: the data set. key: the key of the configuration that names it, for errors. label_column: the column of
    the classes, None without classes. shape: (C, h, w) of the latents. mean, std: (1, C, 1, 1). classes: the
    classes in the order of their labels, or None. Raises ValueError, which names the key, for data that cannot be
    used.
    """

    def __init__(self, folder: str, key: str, label_column: str | None):
        try:
            self.dataset = LatentDataset(folder, {"scaling_factor": 1.0})
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from error
        self.folder, self.key, self.content = folder, key, self.dataset.content
        self.manifest = self.dataset.manifest
        if self.content not in CONTENTS:
            raise ValueError(f"{key}: {folder} holds {self.content}; allowed: {', '.join(CONTENTS)}")
        self.mean, self.std = self._statistics()
        self.shape = self._one_shape()
        self.label_column = label_column
        self.classes = None if label_column is None else self._class_names()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """Read the rows `numbers`, (B,).

        Returns "stored", (B, C, h, w), or (B, 2C, h, w) for moments, float32; with classes also "labels", (B,)
        int64.
        """
        rows = [self.dataset.rows[int(number)] for number in numbers]
        found = {"stored": torch.stack([stored_latents(row, self.content).float() for row in rows])}
        if self.classes is not None:
            labels = [self.classes.index(row[self.label_column]) for row in rows]
            found["labels"] = torch.tensor(labels)
        return found

    def normalised(self, stored: Tensor, draws: Draws) -> Tensor:
        """What `read` returned as "stored" -> normalised latents (B, C, h, w); moments are sampled by `draws`."""
        z = stored
        if self.content == "moments":
            posterior = DiagonalGaussian(stored)
            z = posterior.mean + posterior.std * draws.normal(*self.shape)
        return (z - self.mean.to(z.device)) / self.std.to(z.device)

    def split(self, held_out: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Split the rows by name (`split_by_name`): numbers of the rows to train on, and of those held out."""
        return split_by_name(self.dataset.rows["source_id"], held_out, HELD_OUT, "data.validation_images")

    def batches(self, rows: np.ndarray, batch_size: int, seed: int) -> RowBatches:
        """Batches of `rows` in random order, to train on; dicts as `read` returns them."""
        names = [name.encode() for name in self.dataset.rows["source_id"]]
        made = self.manifest["model"]["weights_sha256"].encode()
        found = {"images": len(self), "sha256": digest_of([made, *names])}
        return RowBatches(self.read, rows, batch_size, seed, found)

    def _statistics(self) -> tuple[Tensor, ...]:
        found = self.manifest["statistics"]
        values = [torch.tensor(found.get(name) or []).view(1, -1, 1, 1) for name in ("mean", "std")]
        if not (values[0].numel() == values[1].numel() > 0 and values[1].min() > 0):
            raise ValueError(
                f"{self.key}: {self.folder} has no mean and std of its channels (statistics in manifest.json), "
                "without which latents cannot be normalised; allowed: what encode-dataset of this version writes"
            )
        return tuple(values)

    def _one_shape(self) -> tuple[int, ...]:
        shapes = {tuple(shape) for shape in self.dataset.rows["shape"]}
        if len(shapes) != 1:
            raise ValueError(
                f"{self.key}: latents of {len(shapes)} shapes in {self.folder}; allowed: one (--crop centre, "
                "random)"
            )
        [(channels, height, width)] = shapes
        return (channels // 2 if self.content == "moments" else channels, height, width)

    def _class_names(self) -> list[Any]:
        """The classes in the order of their labels: whole numbers from 0 to the largest, or names, sorted."""
        if self.label_column not in self.dataset.kept:
            raise ValueError(
                f"data.label_column: {self.label_column} is no column of {self.folder}; allowed: what "
                f"encode-dataset --keep took along ({', '.join(self.dataset.kept) or 'nothing'})"
            )
        found = set(self.dataset.rows[self.label_column])
        if all(isinstance(label, int) and label >= 0 for label in found):
            return list(range(max(found) + 1))
        if all(isinstance(label, str) for label in found):
            return sorted(found)
        raise ValueError(
            f"data.label_column: {self.label_column} holds {str(min(map(repr, found)))[:40]}; allowed: whole "
            "numbers from 0 on, or names"
        )
