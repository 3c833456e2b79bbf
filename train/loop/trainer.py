"""The training loop, and what happens around a step: logs, validation, checkpoints, export."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list, gather_object
from torch.profiler import record_function
from tqdm import tqdm

from kl_autoencoder.distributed import ranks_on_cpus
from kl_autoencoder.evaluation.metrics import LPIPS
from kl_autoencoder.files import replacing
from kl_autoencoder.latents.statistics import LatentStatistics

from ..autoencoder import size, validation
from ..autoencoder.engine import Engine
from ..autoencoder.export import export
from ..config import Config, to_yaml
from ..data.loader import LoaderFailed, TrainLoader
from ..data.samples import SkippedImages
from ..data.training_data import TrainingData
from . import changes, checkpoint
from .announcement import first_lines
from .bad_steps import BadSteps
from .journal import Journal
from .launch import Agreement, StopRequest, hold, refuse_plugins, say_threads
from .schedules import Schedules

STATISTICS_SAMPLES = 512  # crops from which the scaling factor is measured: 0.5 % of its value at f8 and 256
SKIPPED_SHOWN = 5  # held-out images that cannot be read and are named


class TooManyBadSteps(RuntimeError):
    """Gradients were not finite for too many steps in a row."""


class Trainer:
    """Everything a run holds. Making one reads the data, builds the model and finds what there is to resume."""

    def __init__(self, config: Config, statistics_samples: int | None = None):
        self.config, self.statistics_samples = config, statistics_samples or STATISTICS_SAMPLES
        self.folder = Path(config.output_dir)
        cpu = ranks_on_cpus()
        refuse_plugins(os.environ)
        if config.train.mixed_precision == "fp16" and PartialState(cpu=cpu).device.type == "cpu":
            raise ValueError("train.mixed_precision: fp16 on a CPU; allowed there: no, bf16")
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.gradient_accumulation,
            log_with="tensorboard" if config.log.tensorboard else None,
            project_dir=self.folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,
                    comm_hook=DDPCommunicationHookType.BF16
                    if config.train.bf16_gradients
                    else DDPCommunicationHookType.NO,
                )
            ],
        )
        self.device = self.accelerator.device
        ranks = self.accelerator.num_processes
        self.samples_per_step = changes.samples_per_step(config, ranks)
        self.schedules = Schedules(config, self.samples_per_step)
        self.samples = 0  # consumed over all ranks, the position in the data
        self.saved_step: int | None = None  # that of the newest checkpoint
        self._prepare_folder()
        self.skipped = SkippedImages()
        self.journal = Journal(self.folder, self.accelerator, config.log.tensorboard, self.say)
        self.bad_steps = BadSteps(self.samples_per_step, self.journal, self.say)
        memory = size.device_memory(self.device)
        size.check_weights(config, memory)
        perceptual, self.lpips = self._load_perceptual()
        self.engine = Engine(config, self.accelerator, self.schedules, perceptual)
        self._check_resolutions()
        self.data = TrainingData(config.data, config.seed)
        self.source = self.data.fingerprint() if self.is_main else None
        self._resume()
        self.loader = self._loader(self.samples)
        size.check_step(config, self.engine.vae.config, memory)
        self.held_out, self.held_out_images = self._read_held_out(memory)
        self.stop, self.agreement = StopRequest(self.accelerator), Agreement(self.accelerator)
        if self.is_main:  # now that it is known to work: an earlier run's stays where one does not
            with replacing(self.folder / "config.yaml") as beside:
                beside.write_text(to_yaml(config))

    # ---------------------------------------------------------------- the loop

    def fit(self) -> dict | None:
        """Train to the last step and export; returns what the run amounts to, None if it was asked to stop."""
        every = self.config.validation.every
        self._announce()
        before = self.validate() if self.step == 0 else self._recorded_start()
        progress = tqdm(
            total=self.config.train.steps, initial=self.step, unit="step", disable=not self.is_main
        )
        self.journal.start_window(self.step)
        with self._profiler() as profiler, self.stop, progress:  # the bar ends its line whatever happens
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
        self._gather_notes()
        self.say(self.skipped.summary())
        return self.finish(before)

    @property
    def step(self) -> int:
        """How many were taken."""
        return self.engine.step

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def batches(self) -> Iterator[list[dict]]:
        """The micro-batches of each remaining step, from the first sample that was not yet consumed."""
        steps = max(self.config.train.steps - self.step, 0)
        return self._agreed(self.loader, steps, self.config.train.gradient_accumulation)

    def _agreed(self, source: TrainLoader, groups: int, size: int) -> Iterator[list[dict]]:
        """`groups` times `size` batches, each group once all ranks have theirs.

        They are read one group ahead, so that the ranks agree on it while a step is computed. Where one of them
        cannot read on, all save the last whole step and raise LoaderFailed.
        """
        batches = iter(source)
        ready, failure = self._read(batches, size * bool(groups))
        self._end_if_any(failure, self.agreement.start(failure is not None))
        for remaining in reversed(range(groups)):
            ahead, failure = self._read(batches, size * bool(remaining))
            failed = self.agreement.start(failure is not None)
            yield ready
            self._end_if_any(failure, failed)
            ready = ahead

    def _read(self, batches: Iterator[dict], count: int) -> tuple[list[dict], str | None]:
        """The next batches, and why there are none if there are none."""
        with record_function("data"):
            try:
                return list(islice(batches, count)), None
            except LoaderFailed as error:
                return [], str(error)

    def _end_if_any(self, failure: str | None, failed: Callable[[], bool]) -> None:
        if not failed():
            return
        reasons = [reason for reason in gather_object([failure]) if reason]
        if self.step != self.saved_step:
            self.save()
        self.journal.close()
        saved = "" if self.saved_step is None else f"; saved at step {self.saved_step}"
        raise LoaderFailed(reasons[0] + saved)

    def _loader(self, start_sample: int):
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return self.data.loader(start_sample, rank, ranks, self.device)

    def train_step(self, micro_batches: list[dict]) -> None:
        """One step of the optimizers, and what is noted of it."""
        for batch, terms in zip(micro_batches, self.engine.take_step(micro_batches), strict=True):
            self.journal.add(terms)
            self.skipped.add(batch["skipped"])
        self.samples += self.samples_per_step
        self.bad_steps.note(self.step, self.samples, terms)
        limit = self.config.train.max_bad_steps
        if len(self.bad_steps.noted) >= limit and self.step % limit == 0:
            self._report_bad_steps()

    # ---------------------------------------------------------------- what is written down

    def log(self) -> dict[str, str]:
        """Write the means over the window and over all ranks; returns the few that the progress bar shows."""
        self._report_bad_steps()
        values, rate = self.journal.close_window(self.step)
        values |= {
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "images_per_second": rate * self.samples_per_step,
        }
        self.journal.write(self.step, self.samples, {f"train/{name}": v for name, v in values.items()})
        shown = [
            name for name in ("loss", "reconstruction", "kl", "perceptual", "adversarial") if name in values
        ]
        return {n: f"{values[n]:.4g}" for n in shown} | {"images/s": f"{values['images_per_second']:.3g}"}

    def _report_bad_steps(self) -> None:
        """Write down the skipped steps since the last report; too many in a row end the run."""
        most = self.bad_steps.report()
        if most >= self.config.train.max_bad_steps:
            self.save()
            self.journal.close()
            raise TooManyBadSteps(
                f"{most} steps in a row had gradients that are not finite (train.max_bad_steps); "
                f"saved at step {self.saved_step}. Lower the learning rate, or look at the samples named above"
            )

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out images for the weights that would be exported; writes the picture."""
        values: dict[str, list[float]] = {}
        for share in gather_object([validation.measure(self.engine.exported, self.held_out, self.lpips)]):
            for name, of_share in share.items():
                values.setdefault(name, []).extend(of_share)
        metrics = {name: math.fsum(of_all) / len(of_all) for name, of_all in values.items()}
        self.journal.write(self.step, self.samples, {f"validation/{n}": v for n, v in metrics.items()})
        if self.is_main and len(self.held_out):
            shown = self.held_out.first(self.config.validation.pictures)
            try:
                validation.save_pictures(self.picture, self.engine.exported, shown)
                self.journal.show("validation/pictures", self.picture, self.step)
            except OSError as error:
                self.say(f"WARNING: {self.picture}: cannot be written ({error.strerror}); training goes on")
        return metrics

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step-{self.step:06d}.png"

    # ---------------------------------------------------------------- checkpoints and export

    def save(self, last: bool = False) -> None:
        """A checkpoint of everything that the next step depends on.

        One that cannot be written (a full disk) is warned of, and the next save tries again; but the `last` of a
        run raises OSError, on all ranks. Those before it are whole in any case.
        """
        self._report_bad_steps()  # the steps before this one will not be taken again
        self._gather_notes()
        problem = self._on_main(self._write_checkpoint)
        if problem is None:
            self.saved_step = self.step
        elif last:
            raise OSError(problem)
        else:
            self.say(f"WARNING: {problem}; training goes on, and the next save tries again")

    def _write_checkpoint(self) -> None:
        root, config = self.folder / "checkpoints", self.config.checkpoint
        scaler = self.accelerator.scaler
        state = {
            "samples": self.samples,
            "bad_total": self.bad_steps.total,
            "bad_in_a_row": self.bad_steps.in_a_row,
            "skipped": self.skipped.state(),
            "shard_lengths": self.data.lengths,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "source": self.source,
        }
        described = self.engine.exported.to_json_string()
        checkpoint.save_checkpoint(root, self.step, self.engine.tensors(), state, described)
        checkpoint.rotate(root, config.keep_last, config.keep_every)

    def _on_main(self, work: Callable[[], None]) -> str | None:
        """Do it on the main rank while all wait; the message of an OSError, on every rank, or None."""
        problem = None
        if self.is_main:
            try:
                work()
            except OSError as error:
                problem = str(error)
        [problem] = broadcast_object_list([problem])
        return problem

    def _gather_notes(self) -> None:
        """What each rank has found out of the data, to all: images that cannot be used, lengths of shards."""
        for skipped, lengths in gather_object([(self.skipped.state(), self.data.lengths)]):
            self.skipped.merge(skipped)
            self.data.lengths.update(lengths)

    def _resume(self) -> None:
        path = checkpoint.newest(self.folder / "checkpoints", self.say) if self.is_main else None
        [path] = broadcast_object_list([path])
        if path is None:
            self.journal.forget_after(-1)  # of a run that was killed before its first checkpoint
            return
        before = changes.recorded(self.folder / "config.yaml") if self.is_main else None
        [before] = broadcast_object_list([before])
        tensors, state = checkpoint.load_checkpoint(path)
        [source] = broadcast_object_list([self.source])
        sources = (state.get("source"), source)
        changed = changes.refuse_another_run(before, self.config, path, sources) if before else []
        try:
            self.engine.load(tensors)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another configuration: {error}".replace("\n", " ")) from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.engine.step, self.samples = state["step"], state["samples"]
        self.saved_step = self.step
        self.bad_steps.total, self.bad_steps.in_a_row = state["bad_total"], state["bad_in_a_row"]
        self.skipped.merge(state["skipped"])
        self.data.lengths.update(state["shard_lengths"])
        self.journal.forget_after(self.step)
        self.say(f"continuing from {path} ({self.samples:,} samples)")
        if changed:
            jump = changes.rate_jump(before, self.config, self.accelerator.num_processes, self.step)
            self.say("\n  ".join(["changed since it was started last:", *changed, *([jump] if jump else [])]))
        if self.config.ema.enabled and "ema" not in tensors:
            self.say(
                "ema.enabled: the run had no moving average so far; it starts from the weights of this step"
            )
        if "ema" in tensors and not self.config.ema.enabled:
            self.say(
                "ema.enabled: false; the moving average so far ends here, the weights themselves are exported"
            )

    def finish(self, before: dict) -> dict:
        """Measure and export the final weights."""
        after = self.validate()
        facts = {"before": before, "after": after, "step": self.step, "samples": self.samples}
        facts["held_out"] = self.held_out_images
        facts["statistics"] = self.measure_latents()
        if not self.config.train.decoder_only:  # else the latents are those of the pretrained encoder
            self.engine.exported.register_to_config(scaling_factor=facts["statistics"].scaling_factor)
        problem = self._on_main(lambda: self._export(facts))
        self.journal.close()
        if problem is not None:
            raise OSError(f"{problem}; the last checkpoint is whole, and the same command exports it")
        return {"before": before, "after": after, "picture": self.picture, "export": self.folder / "export"}

    def _export(self, facts: dict) -> None:
        kept = self.engine.discriminator_tensors() if self.config.export.training_state else None
        export(self.folder / "export", self.engine.exported, self.config, facts, kept)

    @torch.no_grad()
    def measure_latents(self) -> LatentStatistics:
        """Statistics of the latents of the first samples of the training data, over all ranks."""
        vae = self.engine.exported
        statistics = LatentStatistics(vae.config.latent_channels)
        share = -(-self.statistics_samples // (self.config.data.batch_size * self.accelerator.num_processes))
        for [batch] in self._agreed(self._loader(start_sample=0), share, 1):
            statistics.update(self.engine.latents(batch["images"], batch["sample"]))
        return statistics.reduced(lambda total: self.accelerator.reduce(total.to(self.device), "sum"))

    def _recorded_start(self) -> dict[str, float]:
        """The metrics of the untrained network, as an earlier start of this run wrote them down."""
        for line in self.journal.lines():
            if line["step"] == 0 and "validation/psnr" in line:
                pairs = line.items()
                return {k.removeprefix("validation/"): v for k, v in pairs if k.startswith("validation/")}
        return {}

    # ---------------------------------------------------------------- setting up

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def _prepare_folder(self) -> None:
        if self.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = hold(self.folder, self.say)
            except OSError as error:
                raise ValueError(
                    f"output_dir: {self.folder} cannot be written to ({error.strerror})"
                ) from None
        self.accelerator.wait_for_everyone()

    def _load_perceptual(self) -> tuple[LPIPS | None, LPIPS | None]:
        """The perceptual term, and LPIPS for validation if its weights are to be had."""
        config, perceptual, lpips = self.config.loss.perceptual, None, None
        with self.accelerator.main_process_first():  # one download, not one a rank
            try:
                if config.weight:
                    perceptual = LPIPS(config.net, config.bf16).to(
                        self.device, memory_format=torch.channels_last
                    )
            except FileNotFoundError as error:
                if config.required:
                    hint = "or train without the term: loss.perceptual.weight=0"
                    raise FileNotFoundError(f"{error}; {hint}") from None
                self.say(f"WARNING: training WITHOUT the perceptual term, results will be blurred. {error}")
            try:
                lpips = LPIPS(self.config.validation.lpips_net).to(self.device)
            except FileNotFoundError as error:
                self.say(f"validation reports no LPIPS. {error}")
        return perceptual, lpips

    def _check_resolutions(self) -> None:
        for key in ("resolution", "validation_resolution"):
            size, f = getattr(self.config.data, key), self.engine.vae.downsampling
            if size and (size % f or size < 16):  # SSIM's window has 11 pixels
                raise ValueError(
                    f"data.{key}: {size}; allowed: a multiple of the network's downsampling, {f}, from 16 on"
                )

    def _read_held_out(self, memory: int) -> tuple[validation.HeldOut, int]:
        """This rank's share of the held-out images, and the number of them over all ranks."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        photographs = self.data.held_out()
        size.check_held_out(-(-photographs.count // ranks), photographs.size, memory)
        held_out = validation.HeldOut(photographs, self.config.validation.batch_size, rank, ranks)
        shares = gather_object([(len(held_out), photographs.skipped)])
        skipped = sorted(pair for _, share in shares for pair in share.items())
        for number, why in skipped[:SKIPPED_SHOWN]:
            self.say(f"skipped held-out image {number}: {why}")
        if len(skipped) > SKIPPED_SHOWN:
            self.say(f"skipped {len(skipped)} held-out images in all")
        total = sum(count for count, _ in shares)
        if not total:
            raise ValueError(f"data.validation: no readable images in {photographs.source}")
        return held_out, total

    def _profiler(self):
        """A torch profiler of five steps that writes a trace and a table; nothing unless train.profile is on."""
        if not (self.config.train.profile and self.is_main):
            return contextlib.nullcontext(_NoProfiler)
        from .profiling import profiler

        return profiler(self.folder / "profile", self.say)

    def _announce(self) -> None:
        parameters, ranks = sum(p.numel() for p in self.engine.parameters), self.accelerator.num_processes
        self.say(first_lines(self.config, self.schedules, parameters, ranks, self.device.type))
        if self.device.type == "cpu":
            load, *_ = psutil.getloadavg()  # over the minute in which this started
            self.say(say_threads(torch.get_num_threads(), ranks, os.cpu_count(), load))


class _NoProfiler:
    @staticmethod
    def step() -> None: ...
