"""What the loop asks of that which it trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.loader import TrainLoader
from .player import Player, Tensors

# (loader, groups, size) -> so many groups of so many batches, each once all ranks have theirs
Grouped = Callable[[TrainLoader, int, int], Iterator[list[dict]]]


class Source(Protocol):
    """Where batches come from. lengths: what was learnt about the source, kept in checkpoints."""

    lengths: dict[str, int]

    def fingerprint(self) -> dict[str, Any]:
        """What tells it from another source."""

    def loader(
        self, start_sample: int, rank: int, world_size: int, device: torch.device | str
    ) -> TrainLoader: ...


class Task(Protocol):
    """Networks, a step, a measure of held-out data, and what is left at the end.

    players: the networks that are trained, the first one being what the run is about. shown: the terms that the
    progress bar shows. exported: the model as it would be exported now, with `to_json_string`.
    """

    players: Sequence[Player]
    data: Source
    shown: Iterable[str]

    @property
    def exported(self) -> Any: ...

    def ready(self) -> None:
        """Called once, after a checkpoint was loaded and before the first step: read what is measured on."""

    def playing(self, step: int) -> Sequence[Player]:
        """The players that move in a step."""

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Forward, backward and, with the last micro-batch of a step, update; the terms to be logged."""

    def end_step(self, step: int) -> None:
        """Called after each step; `step` counts those taken."""

    def tensors(self) -> Tensors:
        """Everything that the next step depends on."""

    def load(self, tensors: Tensors) -> None:
        """The inverse of `tensors`."""

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out data over all ranks, of `exported`."""

    def save_pictures(self, path: Path) -> bool:
        """Write a picture of `exported` at work, on the main rank; False if there is nothing to show."""

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        """At the end of a run, on all ranks: facts for `export`."""

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the finished model, on the main rank. facts: of `measure`, and before, after, step, samples."""

    def counted_in_steps(self) -> dict[str, int]:
        """Keys of the configuration that count steps, and their values; for another batch they would differ."""
