"""The training loop, and what happens around a step: logs, validation, checkpoints, export."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from kl_autoencoder.files import replacing

from ..config import Config, to_yaml
from ..data.samples import SkippedImages
from .announcement import first_lines
from .bad_steps import BadSteps
from .batches import AgreedBatches
from .checkpoints import changes
from .checkpoints.saver import Saver
from .context import RunContext
from .journal import Journal
from .launch import Agreement, StopRequest, say_threads
from .task import Task


class TooManyBadSteps(RuntimeError):
    """Gradients were not finite for too many steps in a row."""


class Trainer:
    """A run. Creating it opens the data, builds the networks and loads the newest checkpoint, if there is one.

    step: how many steps were taken. samples: how many they consumed over all ranks, the position in the data.
    """

    def __init__(self, config: Config, make_task: Callable[[RunContext], Task]):
        self.config, self.step, self.samples = config, 0, 0
        self.run = RunContext(config)
        self.folder, self.accelerator, self.say = self.run.folder, self.run.accelerator, self.run.say
        self.skipped = SkippedImages()
        self.journal = Journal(
            self.folder, self.accelerator, config.log.all_trackers, self.say, dataclasses.asdict(config)
        )
        self.bad_steps = BadSteps(self.run.samples_per_step, self.journal, self.say)
        self.task = make_task(self.run)
        self.saver = Saver(self.run, self.task)
        self._resume()
        self.loader = self.task.data.loader(self.samples, self.run.rank, self.run.ranks, self.run.device)
        self.task.ready()
        self.stop = StopRequest(self.accelerator)
        self.agreed = AgreedBatches(Agreement(self.accelerator), self._save_and_close)
        if self.is_main:  # last, so that a run which cannot start leaves the config.yaml of an earlier one
            with replacing(self.folder / "config.yaml") as beside:
                beside.write_text(to_yaml(config))

    @property
    def is_main(self) -> bool:
        return self.run.is_main

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    # ---------------------------------------------------------------- the loop

    def fit(self) -> dict | None:
        """Train to the last step and export; returns the result of `finish`, or None if it was asked to stop."""
        every = self.config.validation.every
        self._announce()
        if self.finished:
            self.say(
                f"all {self.step:,} steps (train.steps) were taken before; measuring and exporting again"
            )
        before = self.validate() if self.step == 0 else self.journal.recorded_start("validation/")
        progress = tqdm(
            total=self.config.train.steps, initial=self.step, unit="step", disable=not self.is_main
        )
        self.journal.start_window(self.step)
        with self._profiler() as profiler, self.stop, progress:  # the bar must end its line whatever happens
            for micro_batches in self.batches():
                self.train_step(micro_batches)
                progress.update()
                profiler.step()
                stopping = self.stop.requested(self.step)
                if self.step % self.config.log.every == 0 or self.finished or stopping:
                    progress.set_postfix(self.log())
                with self.journal.clock_stopped():
                    if every and self.step % every == 0 and not self.finished:
                        self.validate()
                    if self.step % self.config.checkpoint.every == 0 or self.finished or stopping:
                        self.save(last=self.finished or bool(stopping))
                if stopping and not self.finished:
                    what = "interrupted" if stopping == "SIGINT" else f"stopped by {stopping}"
                    self.say(f"{what} at step {self.step}; the same command continues from there")
                    self.journal.close()
                    return None
        self.saver.gather_notes(self.skipped)
        self.say(self.skipped.summary())
        return self.finish(before)

    def batches(self) -> Iterator[list[dict]]:
        """The micro-batches of each remaining step, from the first sample that was not yet consumed."""
        steps = max(self.config.train.steps - self.step, 0)
        return self.agreed.grouped(self.loader, steps, self.config.train.gradient_accumulation)

    def train_step(self, micro_batches: list[dict]) -> None:
        """Take one step, and note its terms, skipped images and gradient norms."""
        for batch, terms in zip(micro_batches, self.take_step(micro_batches), strict=True):
            self.journal.add(terms)
            self.skipped.add(batch["skipped"])
        self.samples += self.run.samples_per_step
        norms = [terms[player.gradient_norm] for player in self.task.players if player.gradient_norm in terms]
        self.bad_steps.note(self.step, self.samples, norms)
        limit = self.config.train.max_bad_steps
        if len(self.bad_steps.noted) >= limit and self.step % limit == 0:
            self._report_bad_steps()

    def take_step(self, micro_batches: list[dict]) -> list[dict[str, Tensor]]:
        """Forward and backward for each micro-batch, then update; the terms of each micro-batch."""
        for player in self.task.players:
            player.begin(self.step)
        networks = [player.network for player in self.task.playing(self.step)]
        found = []
        for batch in micro_batches:
            with self.accelerator.accumulate(*networks):
                found.append(self.task.micro_batch(self.step, batch))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # once all have stepped: accumulated gradients share one scale
        self.step += 1
        self.task.end_step(self.step)
        return found

    def finish(self, before: dict) -> dict:
        """Validate and export the final weights; returns metrics before and after, picture and export folder."""
        after, exported = self.validate(), self.folder / "export"
        facts = {"before": before, "after": after, "step": self.step, "samples": self.samples}
        facts |= self.task.measure(self.agreed.grouped)
        problem = self.run.on_main(lambda: self.task.export(exported, facts))
        self.journal.close()
        if problem is not None:
            raise OSError(f"{problem}; the last checkpoint is whole, and the same command exports it")
        return {"before": before, "after": after, "picture": self.picture, "export": exported}

    # ---------------------------------------------------------------- what is written down

    def log(self) -> dict[str, str]:
        """Log the means since the last line, over all ranks; returns the few that the progress bar shows."""
        self._report_bad_steps()
        values, rate = self.journal.close_window(self.step)
        values |= {
            "learning_rate": self.task.players[0].optimizer.param_groups[0]["lr"],
            "images_per_second": rate * self.run.samples_per_step,
        }
        self.journal.write(self.step, self.samples, {f"train/{name}": v for name, v in values.items()})
        shown = {name: f"{values[name]:.4g}" for name in self.task.shown if name in values}
        return shown | {"images/s": f"{values['images_per_second']:.3g}"}

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out data for the weights that would be exported; writes the picture."""
        metrics = self.task.validate()
        self.journal.write(self.step, self.samples, {f"validation/{n}": v for n, v in metrics.items()})
        if self.is_main:
            try:
                if self.task.save_pictures(self.picture):
                    self.journal.show("validation/pictures", self.picture, self.step)
            except OSError as error:
                self.say(f"WARNING: {self.picture}: cannot be written ({error.strerror}); training goes on")
        return metrics

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step-{self.step:06d}.png"

    def _report_bad_steps(self) -> None:
        """Log the skipped steps since the last report; too many in a row raise TooManyBadSteps."""
        most = self.bad_steps.report()
        if most >= self.config.train.max_bad_steps:
            self.save()
            self.journal.close()
            raise TooManyBadSteps(
                f"{most} steps in a row had gradients that are not finite (train.max_bad_steps); "
                f"saved at step {self.saver.step}. Lower the learning rate, or look at the samples named above"
            )

    # ---------------------------------------------------------------- checkpoints

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of everything that the next step depends on.

        If it cannot be written (a full disk), a warning is printed and the next save tries again; but the `last` of
        a run raises OSError, on all ranks. Earlier checkpoints stay whole in any case.
        """
        self._report_bad_steps()  # these steps will not be taken again
        self.saver.gather_notes(self.skipped)
        counters = {"samples": self.samples, **self.bad_steps.state(), "skipped": self.skipped.state()}
        problem = self.saver.save(self.step, counters)
        if problem and last:
            raise OSError(problem)
        if problem:
            self.say(f"WARNING: {problem}; training goes on, and the next save tries again")

    def _save_and_close(self) -> str:
        """Save and close after a rank could not read on; returns the end of the error message."""
        if self.step != self.saver.step:
            self.save()
        self.journal.close()
        return "" if self.saver.step is None else f"; saved at step {self.saver.step}"

    def _resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, and say what has changed in the configuration."""
        found = self.saver.load()
        if found is None:
            self.journal.forget_after(-1)  # of a run that was killed before its first checkpoint
            return
        self.step, self.samples = found.state["step"], found.state["samples"]
        self.bad_steps.load(found.state)
        self.skipped.merge(found.state["skipped"])
        self.journal.forget_after(self.step)
        self.say(f"continuing from {found.path} ({self.samples:,} samples)")
        if found.changed:
            jump = changes.rate_jump(found.config, self.config, self.run.ranks, self.step)
            lines = ["changed since it was started last:", *found.changed, *([jump] if jump else [])]
            self.say("\n  ".join(lines))

    # ---------------------------------------------------------------- the start

    def _profiler(self):
        """A torch profiler of five steps that writes a trace and a table; nothing unless train.profile is on."""
        if not (self.config.train.profile and self.is_main):
            return contextlib.nullcontext(_NoProfiler)
        from .profiling import profiler

        return profiler(self.folder / "profile", self.say)

    def _announce(self) -> None:
        parameters, device = sum(p.numel() for p in self.task.players[0].parameters), self.run.device.type
        counted = self.task.counted_in_steps()
        self.say(
            first_lines(self.config, self.run.learning_rate, parameters, self.run.ranks, device, counted)
        )
        if device == "cpu":
            load, *_ = psutil.getloadavg()  # over the last minute
            self.say(say_threads(torch.get_num_threads(), self.run.ranks, os.cpu_count(), load))


class _NoProfiler:
    @staticmethod
    def step() -> None: ...
