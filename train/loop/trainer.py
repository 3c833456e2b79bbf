"""`Trainer`: the training loop, with logs, validation, checkpoints and the export."""

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
    """Gradients were not finite in `train.max_bad_steps` steps in a row."""


class Trainer:
    """A run. Creating it opens the data, builds the networks and loads the newest checkpoint, if there is one.

    make_task: builds what is trained. step: how many steps were taken. samples: how many samples they consumed over
    all ranks, the position in the data. Raises ValueError or OSError, one line each, for what prevents a start.
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
        """Train to the last step and export; returns the result of `finish`, or None after a signal to stop.

        Raises, after saving, LoaderFailed if the data cannot be read on and TooManyBadSteps; OSError if the last
        checkpoint or the export cannot be written.
        """
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
        with self._profiler() as profiler, self.stop, progress:  # an error must not print into the bar's line
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
        """Yield the micro-batches of each remaining step, from the first sample that was not yet consumed."""
        steps = max(self.config.train.steps - self.step, 0)
        return self.agreed.grouped(self.loader, steps, self.config.train.gradient_accumulation)

    def train_step(self, micro_batches: list[dict]) -> None:
        """Take one step; hand its terms to the journal, and note its skipped images and gradient norms."""
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
        """Forward and backward for each micro-batch, and one update; returns the terms of each micro-batch."""
        for player in self.task.players:
            player.begin(self.step)
        networks = [player.network for player in self.task.playing(self.step)]
        found = []
        for batch in micro_batches:
            with self.accelerator.accumulate(*networks):
                found.append(self.task.micro_batch(self.step, batch))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # once a step: all players and micro-batches share one loss scale
        self.step += 1
        self.task.end_step(self.step)
        return found

    def finish(self, before: dict) -> dict:
        """Validate and export the final weights.

        before: metrics before training. Returns the metrics `before` and `after`, and the paths `picture` and
        `export`. Raises OSError on all ranks if the model cannot be written.
        """
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
        """Log the means since the last line, over all ranks; returns the terms that the progress bar shows."""
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
        """Measure the weights that would be exported on held-out data; logs the metrics and writes a picture."""
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
        """Log the skipped steps since the last report; for too many in a row, save and raise TooManyBadSteps."""
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

        If it cannot be written (a full disk), a warning is printed and the next save tries again; for the `last`
        save of a run, OSError is raised on all ranks instead. Earlier checkpoints stay whole in any case.
        """
        self._report_bad_steps()  # a continued run does not repeat these steps, so they must be reported now
        self.saver.gather_notes(self.skipped)
        counters = {"samples": self.samples, **self.bad_steps.state(), "skipped": self.skipped.state()}
        problem = self.saver.save(self.step, counters)
        if problem and last:
            raise OSError(problem)
        if problem:
            self.say(f"WARNING: {problem}; training goes on, and the next save tries again")

    def _save_and_close(self) -> str:
        """Save, and close the journal, when a rank could not read on; returns the end of the error message."""
        if self.step != self.saver.step:
            self.save()
        self.journal.close()
        return "" if self.saver.step is None else f"; saved at step {self.saver.step}"

    def _resume(self) -> None:
        """Continue from the newest checkpoint, if there is one, and say what has changed in the configuration."""
        found = self.saver.load()
        if found is None:
            # drop all lines, of a run that was killed before its first checkpoint
            self.journal.forget_after(-1)
            return
        self.step, self.samples = found.state["step"], found.state["samples"]
        self.bad_steps.load(found.state)
        self.skipped.merge(found.state["skipped"])
        self.journal.forget_after(self.step)
        self.say(f"continuing from {found.path} ({self.samples:,} samples)")
        if found.changed:
            jump = changes.rate_jump(
                found.config, self.config, found.state["ranks"], self.run.ranks, self.step
            )
            lines = ["changed since it was started last:", *found.changed, *([jump] if jump else [])]
            self.say("\n  ".join(lines))

    # ---------------------------------------------------------------- the start

    def _profiler(self):
        """A context whose value has `step()`: a profiler on the main rank if train.profile is on, else a no-op."""
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
