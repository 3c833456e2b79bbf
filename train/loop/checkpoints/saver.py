"""`Saver`: saves and loads a task's tensors with the run's counters, and compares configurations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from ...data.samples import SkippedImages
from ..context import RunContext
from ..task import Task
from . import changes, files


@dataclass(frozen=True)
class Found:
    """A checkpoint that was loaded. config: that of the run so far. changed: a line for each key that differs."""

    path: Path
    state: dict[str, Any]
    config: dict[str, Any] | None
    changed: list[str]


class Saver:
    """Saves a task and loads it, on all ranks together. step: that of the newest checkpoint, None without one."""

    def __init__(self, run: RunContext, task: Task):
        self.run, self.task, self.root = run, task, run.folder / "checkpoints"
        self.step: int | None = None
        self.source = task.data.fingerprint() if run.is_main else None

    def save(self, step: int, counters: dict[str, Any]) -> str | None:
        """Write a checkpoint and remove old ones while all ranks wait; returns why that failed, or None."""
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
        }
        described = self.task.exported.to_json_string()
        files.save_checkpoint(self.root, step, self.task.tensors(), state, described)
        files.rotate(self.root, config.keep_last, config.keep_every)

    def gather_notes(self, skipped: SkippedImages) -> None:
        """Give all ranks what each has found out about the data: images that cannot be used, lengths of shards."""
        for of_rank, lengths in gather_object([(skipped.state(), self.task.data.lengths)]):
            skipped.merge(of_rank)
            self.task.data.lengths.update(lengths)

    def load(self) -> Found | None:
        """Load the newest checkpoint that is whole, on all ranks; None if there is none.

        Raises ValueError for one of another run, or of other networks.
        """
        path = files.newest(self.root, self.run.say) if self.run.is_main else None
        [path] = broadcast_object_list([path])
        if path is None:
            return None
        before = changes.recorded(self.run.folder / "config.yaml") if self.run.is_main else None
        [before] = broadcast_object_list([before])
        tensors, state = files.load_checkpoint(path)
        [source] = broadcast_object_list([self.source])
        sources = (state.get("source"), source)
        changed = changes.refuse_another_run(before, self.run.config, path, sources) if before else []
        try:
            self.task.load(tensors)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another configuration: {error}".replace("\n", " ")) from None
        if self.run.accelerator.scaler is not None and state["scaler"]:
            self.run.accelerator.scaler.load_state_dict(state["scaler"])
        self.task.data.lengths.update(state["shard_lengths"])
        self.step = state["step"]
        return Found(path, state, before, changed)
