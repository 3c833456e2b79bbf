"""What `encode-dataset` wrote, as a data set to train a diffusion model on."""

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

PLAIN = ("row", "source_id", "flipped")  # columns that are passed on as they are


class LatentDataset(Dataset):
    """`dataset[i]` -> {"latents": (C, h, w) float32, scaled, "original_size": (H, W), ...}.

    Where moments are stored, the latents are a draw from them, another one in each epoch: a function of the seed,
    the epoch and i. `set_epoch` reaches the workers of a loader that are running already. "crop_box" is (left, top,
    right, bottom) in pixels of the photograph; "row", "source_id", "flipped" and the columns kept are as they are
    in the files. Latents of buckets differ in shape: `DataLoader(dataset, batch_sampler=SameShape(dataset, 16))`.
    Of a data set of codes it is {"codes": (h, w) int64, ...}, and the scaling is not used.

    Args:
        folder: the output of `encode-dataset`.
        config: the model's scaling, which is applied (see `scaling.scale`): `vae.scaling`, or `vae.config` where
            that holds it.

    Raises FileNotFoundError or ValueError for a folder that is no complete data set of latents.
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
    """The tensor in a row of the data set, in the type that it is stored in."""
    values = torch.frombuffer(bytearray(row[content]), dtype=getattr(torch, row["dtype"]))
    return values.view(row["shape"])


class SameShape(Sampler[list[int]]):
    """Batches of latents of one shape in random order, another one in each epoch; the same in every process.

    The last of each shape may be smaller, or is left out with `drop_last`.
    """

    def __init__(self, dataset: LatentDataset, batch_size: int, drop_last: bool = False):
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        shapes = np.array(dataset.rows.with_format("numpy")["shape"][:])
        _, kinds = np.unique(shapes, axis=0, return_inverse=True)
        self.kinds = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]

    def __len__(self) -> int:
        return sum(len(range(0, self._end(kind), self.batch_size)) for kind in self.kinds)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
        batches = []
        for kind in self.kinds:
            order = rng.permutation(kind)
            batches += [
                order[i : i + self.batch_size].tolist() for i in range(0, self._end(kind), self.batch_size)
            ]
        rng.shuffle(batches)
        yield from batches

    def _end(self, kind: np.ndarray) -> int:
        return len(kind) // self.batch_size * self.batch_size if self.drop_last else len(kind)
