"""`Task`: the interface between the loop and what it trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .player import Player, Tensors

# `AgreedBatches.grouped`: (loader, groups, size) -> `groups` lists of `size` batches, the same number on all ranks
Grouped = Callable[[Iterable[dict], int, int], Iterator[list[dict]]]


class Source(Protocol):
    """Where batches come from. lengths: records of each shard, found while reading, kept in checkpoints."""

    lengths: dict[str, int]

    def fingerprint(self) -> dict[str, Any]:
        """Numbers and hashes that tell it from another source."""

    def loader(
        self, start_sample: int, rank: int, world_size: int, device: torch.device | str
    ) -> Iterable[dict]:
        """The micro-batches of a rank from a sample of the run on, without end.

        Each holds "sample", (B,) int64, the numbers of its samples, and "skipped", [(name, reason), ...].
        """


class Task(Protocol):
    """What a run trains: networks, a step, validation, the export.

    players: the networks that are trained, the main one first. shown: the terms that the progress bar shows.
    exported: the model as it would be exported now, which has `to_json_string`.
    """

    players: Sequence[Player]
    data: Source
    shown: Iterable[str]

    @property
    def exported(self) -> Any: ...

    def ready(self) -> None:
        """Called once, after a checkpoint was loaded and before the first step: read the held-out data."""

    def playing(self, step: int) -> Sequence[Player]:
        """The players that are trained in a step."""

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Forward, backward and, in the last micro-batch of a step, update; returns the terms to log."""

    def end_step(self, step: int) -> None:
        """Called after each step; `step` is the number of steps taken."""

    def tensors(self) -> Tensors:
        """Everything that the next step depends on."""

    def load(self, tensors: Tensors) -> None:
        """The inverse of `tensors`."""

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out data over all ranks, of `exported`."""

    def save_pictures(self, path: Path) -> bool:
        """Write a picture of `exported` at work, on the main rank; False if there is nothing to show."""

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        """Measure what `export` writes down, at the end of a run, on all ranks."""

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the finished model, on the main rank. facts: of `measure`, with before, after, step, samples."""

    def counted_in_steps(self) -> dict[str, int]:
        """Keys of the configuration that count steps, and their values, beside train.steps."""
