"""Batches of rows that are read by number, without worker processes: latents or codes of images."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .random_access import SampleOrder


class RowBatches:
    """The training rows of a data set as batches, ordered by `SampleOrder`, like the images of `TrainingData`.

    read: row numbers (B,) -> {name: (B, ...)}. rows: the numbers of the training rows. fingerprint: what
    `fingerprint()` returns.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], dict[str, Tensor]],
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        fingerprint: dict[str, Any],
    ):
        self.read, self.rows, self.batch_size, self.seed = read, rows, batch_size, seed
        self._fingerprint = fingerprint
        self.lengths: dict[str, int] = {}  # those of shards, which only a stream has

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data set, for comparison with a checkpoint's."""
        return self._fingerprint

    def loader(
        self, start_sample: int = 0, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[dict]:
        """Yield the endless micro-batches of a rank: what `read` returns, "sample": (B,) int64, "skipped": []."""
        order = SampleOrder(len(self.rows), self.seed, self.batch_size, start_sample, rank, world_size)
        for draws in order:
            batch = self.read(self.rows[[draw.index for draw in draws]])
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            yield moved | {"sample": torch.tensor([draw.sample for draw in draws]), "skipped": []}


def split_by_name(names: Sequence[str], held_out: int | None, most: int, key: str) -> tuple[np.ndarray, ...]:
    """Split rows by their names: the numbers of the rows to train on and of the rows held out, both ascending.

    Held out are the names with the smallest hashes, the same in every run; rows with the same name stay together.
    held_out: how many names; None: an eighth of the names, at least 1 and at most `most`. Raises ValueError, naming
    `key`, if no name would be left to train on.
    """
    hashes = {name: hashlib.sha256(b"held out " + name.encode()).digest() for name in names}
    wanted = held_out or max(1, min(most, len(hashes) // 8))
    if wanted >= len(hashes):
        raise ValueError(f"{key}: {wanted}, to be held out of {len(hashes)} images; allowed: fewer")
    chosen = set(sorted(hashes, key=hashes.__getitem__)[:wanted])
    is_held_out = np.array([name in chosen for name in names])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def digest_of(names: Iterable[bytes]) -> str:
    """SHA-256 (hexadecimal) over the names of a source's samples and their lengths, for a fingerprint."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(len(name).to_bytes(8, "big") + name)
    return digest.hexdigest()
