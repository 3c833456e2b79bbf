"""`Task`: the interface between the loop and what it trains."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .player import Player, Tensors

# `AgreedBatches.grouped`: (loader, groups, size) -> `groups` lists of `size` batches, as many on all ranks
Grouped = Callable[[Iterable[dict], int, int], Iterator[list[dict]]]


class Source(Protocol):
    """Where batches come from.

    lengths: name of a shard -> its number of records, found while reading and kept in checkpoints.
    """

    lengths: dict[str, int]

    def fingerprint(self) -> dict[str, Any]:
        """Counts and hashes that differ between this source and another; kept in checkpoints as JSON."""

    def loader(
        self, start_sample: int, rank: int, world_size: int, device: torch.device | str
    ) -> Iterable[dict]:
        """An endless sequence of the micro-batches of a rank, from sample number `start_sample` of the run on.

        Each is a dict that holds at least "sample", (B,) int64, the numbers of its samples, and "skipped", a list
        of (name, reason) for images that cannot be used.
        """


class Task(Protocol):
    """What a run trains: networks, a step, validation, the export.

    players: the networks that are trained, the main one first. data: where the batches come from. shown: names of
    the terms that the progress bar shows. exported: the model as it would be exported now, which must have
    `to_json_string()`, its config.json. All methods are called on all ranks, unless they say otherwise.
    """

    players: Sequence[Player]
    data: Source
    shown: Iterable[str]

    @property
    def exported(self) -> Any: ...

    def ready(self) -> None:
        """Read the held-out data; called once, after a checkpoint was loaded and before the first step."""

    def playing(self, step: int) -> Sequence[Player]:
        """The players that are trained in `step`, which counts from 0."""

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Forward, backward and, in the last micro-batch of a step, update.

        step: counts from 0. Returns the terms to log: name -> scalar tensor on the device.
        """

    def end_step(self, step: int) -> None:
        """Called after each step, to move an average of the weights say; `step` is the number of steps taken."""

    def tensors(self) -> Tensors:
        """Every tensor that the next step depends on, for a checkpoint. Called on the main rank only."""

    def load(self, tensors: Tensors) -> None:
        """Load what `tensors` returned. Raises KeyError or RuntimeError for the tensors of other networks."""

    def validate(self) -> dict[str, float]:
        """Metrics of `exported` on the held-out data, name -> value over all ranks."""

    def save_pictures(self, path: Path) -> bool:
        """Write a picture of what `exported` does; False if there is none. Called on the main rank only."""

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        """Measure, at the end of a run, what `export` needs to know of the finished model."""

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the finished model to `folder`. Called on the main rank only.

        facts: the result of `measure`, and before, after (results of `validate`), step, samples. Raises OSError if
        the model cannot be written.
        """

    def counted_in_steps(self) -> dict[str, int]:
        """Dotted keys of the configuration that count steps, except train.steps -> their values."""
