"""Samples that are read by their number, a batch at a time and without workers: latents or codes of images."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .random_access import SampleOrder


class RowBatches:
    """The training rows of a data set as batches, in the order that images have in `TrainingData`.

    read: numbers of rows (B,) -> {name: (B, ...)}. rows: the numbers of the training rows. found: its fingerprint.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], dict[str, Tensor]],
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        found: dict[str, Any],
    ):
        self.read, self.rows, self.batch_size, self.seed, self.found = read, rows, batch_size, seed, found
        self.lengths: dict[str, int] = {}  # nothing is found out while reading

    def fingerprint(self) -> dict[str, Any]:
        return self.found

    def loader(
        self, start_sample: int = 0, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[dict]:
        """The micro-batches of a rank, without end: what `read` gives, "sample" (B,) and "skipped", always []."""
        order = SampleOrder(len(self.rows), self.seed, self.batch_size, start_sample, rank, world_size)
        for draws in order:
            batch = self.read(self.rows[[draw.index for draw in draws]])
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            yield moved | {"sample": torch.tensor([draw.sample for draw in draws]), "skipped": []}


def split_by_name(names: Sequence[str], held_out: int | None, most: int, key: str) -> tuple[np.ndarray, ...]:
    """Rows to train on and rows held out: those whose names have the smallest hashes, the same in every run.

    Rows of one name stay together. held_out: how many names are held out; None: `most`, and an eighth at most.
    Raises ValueError naming `key` if nothing would be left to train on.
    """
    hashes = {name: hashlib.sha256(b"held out " + name.encode()).digest() for name in names}
    wanted = held_out or max(1, min(most, len(hashes) // 8))
    if wanted >= len(hashes):
        raise ValueError(f"{key}: {wanted}, to be held out of {len(hashes)} images; allowed: fewer")
    chosen = set(sorted(hashes, key=hashes.__getitem__)[:wanted])
    is_held_out = np.array([name in chosen for name in names])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def digest_of(names: Iterable[bytes]) -> str:
    """SHA-256 over the names of a source's samples, for a fingerprint."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(len(name).to_bytes(8, "big") + name)
    return digest.hexdigest()
