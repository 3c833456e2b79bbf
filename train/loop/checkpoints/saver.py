"""`Saver`: save and load a task's tensors with the run's counters, and refuse the checkpoint of another run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from ...data.samples import SkippedImages
from ..context import RunContext
from ..task import Task
from . import changes, files


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was loaded.

    state: the contents of state.json. config: the configuration of the run so far, None if unknown. changed: a line
    for each key whose value differs now, and for another number of ranks.
    """

    path: Path
    state: dict[str, Any]
    config: dict[str, Any] | None
    changed: list[str]


class Saver:
    """Saves and loads a task; every method must be called on all ranks.

    step: the step of the newest checkpoint, None if there is none.
    """

    def __init__(self, run: RunContext, task: Task):
        self.run, self.task, self.root = run, task, run.folder / "checkpoints"
        self.step: int | None = None
        self.source = task.data.fingerprint() if run.is_main else None

    def save(self, step: int, counters: dict[str, Any]) -> str | None:
        """Write a checkpoint on the main rank and remove old ones; returns why it failed, or None, on all ranks."""
        problem = self.run.on_main(lambda: self._write(step, counters))
        if problem is None:
            self.step = step
        return problem

    def _write(self, step: int, counters: dict[str, Any]) -> None:
        scaler, config = self.run.accelerator.scaler, self.run.config.checkpoint
        state = {
            **counters,
            "shard_lengths": self.task.data.lengths,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "source": self.source,
            "ranks": self.run.ranks,
        }
        described = self.task.exported.to_json_string()
        files.save_checkpoint(self.root, step, self.task.tensors(), state, described)
        files.rotate(self.root, config.keep_last, config.keep_every)

    def gather_notes(self, skipped: SkippedImages) -> None:
        """Share among all ranks what each has learned about the data: unusable images and lengths of shards."""
        for of_rank, lengths in gather_object([(skipped.state(), self.task.data.lengths)]):
            skipped.merge(of_rank)
            self.task.data.lengths.update(lengths)

    def load(self) -> LoadedCheckpoint | None:
        """Load the newest undamaged checkpoint; returns None if there is none.

        Raises ValueError if it belongs to another run (`changes.refuse_another_run`) or to other networks.
        """
        path = files.newest(self.root, self.run.say) if self.run.is_main else None
        [path] = broadcast_object_list([path])
        if path is None:
            return None
        before = changes.read_config(self.run.folder / "config.yaml") if self.run.is_main else None
        [before] = broadcast_object_list([before])
        tensors, state = files.load_checkpoint(path)
        [source] = broadcast_object_list([self.source])
        sources = (state.get("source"), source)
        changed = changes.refuse_another_run(before, self.run.config, path, sources) if before else []
        ranks = state.setdefault("ranks", self.run.ranks)  # older checkpoints lack it
        if ranks != self.run.ranks:
            changed.append(f"ranks: {ranks} -> {self.run.ranks}, {self.run.samples_per_step} samples a step")
        try:
            self.task.load(tensors)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another configuration: {error}".replace("\n", " ")) from None
        if self.run.accelerator.scaler is not None and state["scaler"]:
            self.run.accelerator.scaler.load_state_dict(state["scaler"])
        self.task.data.lengths.update(state["shard_lengths"])
        self.step = state["step"]
        return LoadedCheckpoint(path, state, before, changed)
