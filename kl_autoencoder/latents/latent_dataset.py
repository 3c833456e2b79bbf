"""Read the output of `encode-dataset` as a data set to train a diffusion model on."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..models.scaling import KEPT_KEYS, scale
from ..networks.distributions import DiagonalGaussian
from .shards import read_manifest

PLAIN = ("row", "source_id", "flipped")  # columns that are returned unchanged


class LatentDataset(Dataset):
    """`dataset[i]` -> {"latents": (C, h, w) float32, scaled, "original_size": (H, W), ...}.

    If moments are stored, the latents are drawn from them, anew in each epoch, as a function of the seed, the epoch
    and i. `set_epoch` also reaches workers of a loader that are already running. "crop_box" is (left, top, right,
    bottom) in pixels of the photograph; "row", "source_id", "flipped" and the columns of --keep are as stored.
    Latents of buckets differ in shape: `DataLoader(dataset, batch_sampler=SameShape(dataset, 16))`. A data set of
    codes returns {"codes": (h, w) int64, ...} and does not use the scaling.

    Args:
        folder: the output of `encode-dataset`.
        config: the model's scaling, which is applied (see `scaling.scale`): `vae.scaling`, or a `vae.config` that
            contains it.
        seed: of the draws and of the order of `SameShape`.

    Raises FileNotFoundError or ValueError for a folder that is not a complete data set of latents, and ValueError
    for a config without scaling_factor.
    """

    def __init__(self, folder: str | os.PathLike, config: Mapping[str, Any], seed: int = 0):
        self.manifest = read_manifest(folder)
        self.config, self.seed = {key: value for key, value in config.items() if key in KEPT_KEYS}, seed
        if "scaling_factor" not in self.config:
            raise ValueError("config: no scaling_factor; allowed: vae.scaling, of the model that encoded")
        self.content = self.manifest["settings"]["content"]
        self.kept = self.manifest["settings"]["keep"]
        files = sorted(str(path) for path in (Path(folder) / "data").glob("*.parquet"))
        self.rows = datasets.load_dataset("parquet", data_files=files, split="train")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[int(i)]
        stored = stored_latents(row, self.content)[None]
        about = {
            "original_size": torch.tensor(row["original_size"]),
            "crop_box": torch.tensor(row["crop_box"]),
            **{key: row[key] for key in (*PLAIN, *self.kept)},
        }
        if self.content == "codes":
            return {"codes": stored[0, 0].long(), **about}
        stored = stored.float()
        if self.content == "moments":
            seed = np.random.SeedSequence((self.seed, self.epoch, int(i))).generate_state(1, np.uint64)
            stored = DiagonalGaussian(stored).sample(torch.Generator().manual_seed(int(seed[0])))
        return {"latents": scale(stored, self.config)[0], **about}


def stored_latents(row: Mapping[str, Any], content: str) -> Tensor:
    """The tensor of a row, in its stored shape and type; `content` is that of `EncodeSettings`."""
    values = torch.frombuffer(bytearray(row[content]), dtype=getattr(torch, row["dtype"]))
    return values.view(row["shape"])


class SameShape(Sampler[list[int]]):
    """A batch sampler whose batches have latents of one shape, in an order that is random in each epoch.

    The order is the same in every process. The last batch of each shape may be smaller, unless `drop_last` leaves
    it out.
    """

    def __init__(self, dataset: LatentDataset, batch_size: int, drop_last: bool = False):
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        shapes = np.array(dataset.rows.with_format("numpy")["shape"][:])
        _, kinds = np.unique(shapes, axis=0, return_inverse=True)
        self.kinds = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]

    def __len__(self) -> int:
        return sum(len(range(0, self._count_used(kind), self.batch_size)) for kind in self.kinds)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
        batches = []
        for kind in self.kinds:
            order = rng.permutation(kind)
            batches += [
                order[i : i + self.batch_size].tolist()
                for i in range(0, self._count_used(kind), self.batch_size)
            ]
        rng.shuffle(batches)
        yield from batches

    def _count_used(self, kind: np.ndarray) -> int:
        """How many of the latents of one shape are used in an epoch."""
        return len(kind) // self.batch_size * self.batch_size if self.drop_last else len(kind)
