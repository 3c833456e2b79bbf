"""The training loop: one step of the autoencoder, one of the discriminator, and what happens around them."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list, gather_object
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.files import replacing
from kl_autoencoder.latents import LatentStatistics
from kl_autoencoder.metrics import LPIPS
from kl_autoencoder.network import ResnetBlock
from kl_autoencoder.ranks import ranks_on_cpus

from . import checkpoint, data, losses, validation
from .config import Config, to_yaml
from .discriminator import PatchDiscriminator
from .export import export
from .journal import Journal
from .launch import StopRequest, hold
from .model import MovingAverage, TrainedModel, build_autoencoder

POSTERIOR_NOISE = 1  # what a stream of random numbers is for, beside the seed and the sample that key it
STATISTICS_SAMPLES = 512  # crops from which the scaling factor is measured: 0.5 % of its value at f8 and 256
LECAM_DECAY = 0.99
PERCEPTUAL_PIXELS = 4 * 256 * 256  # LPIPS holds some 250 MB of VGG features for each image of 256x256


class TooManyBadSteps(RuntimeError):
    """Gradients were not finite for too many steps in a row."""


class Trainer:
    """Everything a run holds. Making one reads the data, builds the model and finds what there is to resume."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.output_dir)
        cpu = ranks_on_cpus()
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
        self.samples_per_step = config.data.batch_size * ranks * config.train.gradient_accumulation
        self.step = self.samples = 0  # samples: consumed over all ranks, the position in the data
        self.bad_steps: list[dict] = []
        self._prepare_folder()
        self.skipped = data.SkippedImages()
        self.journal = Journal(self.folder, self.accelerator, config.log.tensorboard)
        self._load_perceptual()
        self._build()
        self._resume()
        self.loader = self._loader(self.samples)
        self.held_out = data.validation_images(config.data)
        self.stop = StopRequest(self.accelerator)
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
                stopping = self.stop.requested()
                if self.step % self.config.log.every == 0 or self.finished or stopping:
                    progress.set_postfix(self.log())
                if every and self.step % every == 0 and not self.finished:
                    self.validate()
                if self.step % self.config.checkpoint.every == 0 or self.finished or stopping:
                    self.save()
                if stopping and not self.finished:
                    self.say(
                        f"stopped by {stopping} at step {self.step}; the same command continues from there"
                    )
                    self.accelerator.end_training()  # TensorBoard's last two minutes are in memory
                    return None
        self._gather_skipped()
        self.say(self.skipped.summary())
        return self.finish(before)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def batches(self) -> Iterator[list[dict]]:
        """The micro-batches of each remaining step, from the first sample that was not yet consumed."""
        if self.finished:
            return
        loader = iter(self.loader)
        while not self.finished:
            with record_function("data"):
                micro_batches = [next(loader) for _ in range(self.config.train.gradient_accumulation)]
            yield micro_batches

    def _loader(self, start_sample: int):
        return data.train_loader(
            self.config.data,
            seed=self.config.seed,
            start_sample=start_sample,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    # ---------------------------------------------------------------- one step

    def train_step(self, micro_batches: list[dict]) -> None:
        """One step of the optimizers: forward and backward for each micro-batch, clip, update, average."""
        self._set_learning_rates()
        networks = [self.model, self.discriminator] if self.discriminates else [self.model]
        for batch in micro_batches:
            images = batch["images"].to(self.device, memory_format=torch.channels_last, non_blocking=True)
            with self.accelerator.accumulate(*networks):
                terms, reconstruction = self.autoencoder_step(images, self._noise(batch["sample"]))
                if self.discriminates:
                    terms |= self.discriminator_step(images, reconstruction)
            self.journal.add(terms)
            self.skipped.add(batch["skipped"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # once both have stepped: accumulated gradients share one scale
        self.step += 1
        self.samples += self.samples_per_step
        if self.ema is not None:
            with record_function("optimizer"):
                self.ema.update(self.vae, self.step)
        self._note_bad_step(terms)

    def autoencoder_step(self, images: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Move the autoencoder by one micro-batch; returns the terms and the detached reconstruction.

        The gradient in the reconstruction is formed term by term first, each network's graph being freed before
        the next is built, and goes through the autoencoder once. The norms that the adaptive weight compares
        cost no second pass through LPIPS or the discriminator that way.
        """
        config = self.config.loss
        with record_function("autoencoder"):
            output, posterior, log_scale = self.model(images, noise)
            reconstruction = output.detach().float().requires_grad_()
            pixels = losses.reconstruction_nll(
                config.reconstruction, reconstruction, images, log_scale
            ).mean()
            kl = losses.kl_per_dimension(posterior, images[0].numel(), config.kl.free_bits).mean()
            kl_loss = config.kl.weight * losses.ramp(self.step, config.kl.warmup_steps) * kl
            terms = {"loss": pixels + kl_loss, "reconstruction": pixels, "kl": kl}
            (gradient,) = torch.autograd.grad(pixels, reconstruction)
        if self.perceptual is not None:
            with record_function("perceptual"):
                terms["perceptual"], more = self._perceptual(reconstruction, images)
                gradient = gradient + config.perceptual.weight * more
                terms["loss"] = terms["loss"] + config.perceptual.weight * terms["perceptual"]
        if self.adversarial_weight() > 0:
            with record_function("discriminator"):
                gradient = gradient + self._adversarial_gradient(reconstruction, output, gradient, terms)
        with record_function("autoencoder"):
            # a scalar whose gradient in the output is `gradient`
            surrogate = (output.float() * gradient.detach()).sum() + kl_loss
            if log_scale is not None:
                surrogate = (
                    surrogate
                    + losses.reconstruction_nll(
                        config.reconstruction, reconstruction.detach(), images, log_scale
                    ).mean()
                )
                terms["log_scale"] = log_scale
            self._backward(surrogate, terms["loss"])
        self._update(self.optimizer, self.parameters, terms, "gradient_norm")
        if (self.step + 1) % self.config.log.every == 0:
            with torch.no_grad():
                terms |= losses.latent_summary(posterior)
        return terms, reconstruction.detach()

    def _perceptual(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean LPIPS and its gradient in the reconstruction, a few images at a time: they share nothing."""
        at_a_time = max(1, PERCEPTUAL_PIXELS // images[0, 0].numel())
        distances, gradients = [], []
        for part, real in zip(reconstruction.split(at_a_time), images.split(at_a_time), strict=True):
            distance = self.perceptual(part, real).sum() / len(images)
            gradients += torch.autograd.grad(distance, part)
            distances.append(distance.detach())
        return torch.stack(distances).sum(), torch.cat(gradients)

    def _adversarial_gradient(self, reconstruction, output, nll_gradient, terms: dict[str, Tensor]) -> Tensor:
        """The weighted gradient of the adversarial term in the reconstruction.

        Taken in the reconstruction alone, so that it leaves the discriminator's gradients as they are.
        """
        config = self.config.loss.adversarial
        network = self.accelerator.unwrap_model(self.discriminator)
        with self.accelerator.autocast():
            logits = network(reconstruction)
        loss = losses.generator_loss(config.loss, logits)
        # the gradient of the sum over patches stays within half precision where that of the mean may not
        (gradient,) = torch.autograd.grad(loss * logits.numel(), reconstruction)
        gradient = gradient / logits.numel()
        weight = torch.full((), self.adversarial_weight(), device=self.device)
        if config.adaptive:
            terms["adaptive_weight"] = self._adaptive_weight(output, nll_gradient, gradient)
            weight = weight * terms["adaptive_weight"]
        terms["adversarial"], terms["loss"] = loss, terms["loss"] + weight * loss
        return weight * gradient

    def _adaptive_weight(self, output: Tensor, *gradients: Tensor) -> Tensor:
        """From the two gradients in the output to their norms at the last layer's weight, over all ranks."""
        last_layer = self.vae.decoder.conv_out.weight
        at_weight = []
        for gradient in gradients:
            norm = gradient.norm().clamp(min=1e-30)  # sent back at length 1: a mean's would vanish in fp16
            unit = (gradient / norm).to(output.dtype)
            at_weight.append(norm * torch.autograd.grad(output, last_layer, unit, retain_graph=True)[0])
        return losses.adaptive_weight(*self.accelerator.reduce(torch.stack(at_weight).float(), "mean"))

    def discriminator_step(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Move the discriminator by one micro-batch, in one forward over real and reconstructed images."""
        config = self.config.loss.adversarial
        with record_function("discriminator"):
            logits = self.discriminator(torch.cat([images, reconstruction]))
            real, fake = logits.float().chunk(2)
            loss = losses.discriminator_loss(config.loss, real, fake)
            terms = {"discriminator/logits_real": real.mean(), "discriminator/logits_fake": fake.mean()}
            if config.lecam_weight:
                loss = loss + config.lecam_weight * losses.lecam(real, fake, *self.lecam_anchors)
                self.logit_means.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
            if config.r1_weight and self.step % config.r1_every == 0:
                terms["discriminator/r1"] = penalty = self._r1(images)
                loss = loss + config.r1_weight * config.r1_every * penalty
            terms["discriminator/loss"] = loss
            self._backward(loss, loss)
        self._update(self.disc_optimizer, self.disc_parameters, terms, "discriminator/gradient_norm")
        if self.logit_means and self.accelerator.sync_gradients:
            self._move_lecam_anchors(terms["discriminator/gradient_norm"].isfinite())
        return terms

    def _r1(self, images: Tensor) -> Tensor:
        """R1 in float32: its double gradient leaves the range of half precision."""
        network, images = self.accelerator.unwrap_model(self.discriminator), images.detach().requires_grad_()
        with torch.autocast(self.device.type, enabled=False):
            # past the `forward` that accelerate puts on a module, which switches autocast on again
            return losses.r1_penalty(PatchDiscriminator.forward(network, images), images)

    def _move_lecam_anchors(self, taken: Tensor) -> None:
        """Once a step, so that micro-batches are one large batch; a step that was skipped leaves them alone."""
        means = self.accelerator.reduce(torch.stack(self.logit_means).mean(dim=0), "mean")
        moved = torch.lerp(self.lecam_anchors, means, 1 - LECAM_DECAY)
        self.lecam_anchors = torch.where(taken, moved, self.lecam_anchors)
        self.logit_means.clear()

    def _backward(self, loss: Tensor, watched: Tensor) -> None:
        """Backward; where `watched` is not finite all gradients become NaN, and so, averaged, on every rank."""
        self.accelerator.backward(loss * torch.where(watched.detach().isfinite(), 1.0, math.nan))

    def _update(self, optimizer, parameters, terms: dict[str, Tensor], name: str) -> None:
        """Clip and step, but only where the gradient norm over all ranks is finite; the host waits for nothing."""
        if not self.accelerator.sync_gradients:
            return
        scaler = self.accelerator.scaler
        with record_function("optimizer"):
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip = self.config.optimizer.gradient_clip or math.inf
            terms[name] = torch.nn.utils.clip_grad_norm_(parameters, clip)
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.found_inf = (~terms[name].isfinite()).float()  # as a GradScaler does
                optimizer.step()
            optimizer.zero_grad()

    def _noise(self, samples: Tensor) -> Tensor:
        """Standard normal noise for the posteriors, a function of the seed and the sample's number alone.

        So it is the same on any number of ranks and after any restart.
        """
        c = self.vae.config.latent_channels
        side = self.config.data.resolution // self.vae.downsampling
        noise = np.empty((len(samples), c, side, side), np.float32)
        for row, n in zip(noise, samples.tolist(), strict=True):
            key = np.random.SeedSequence((self.config.seed, n, POSTERIOR_NOISE))
            np.random.Generator(np.random.Philox(key)).standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(noise).to(self.device, non_blocking=True)

    # ---------------------------------------------------------------- schedules

    @property
    def discriminates(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.loss.adversarial.disc_start

    def adversarial_weight(self) -> float:
        """0 until the discriminator has had its stretch alone, then rising to the configured weight."""
        config = self.config.loss.adversarial
        since = self.step - config.disc_start - config.disc_warmup_steps
        return config.weight * losses.ramp(since + 1, config.ramp_steps + 1) if since >= 0 else 0.0

    def learning_rate(self) -> float:
        """The rate of the coming step: warmed up and decayed."""
        config, steps = self.config.optimizer, self.config.train.steps
        after = max(0, self.step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - after, "cosine": 0.5 * (1 + math.cos(math.pi * after))}
        warm = losses.ramp(self.step + 1, config.warmup_steps + 1)
        return self.peak_learning_rate() * warm * decay[config.schedule]

    def peak_learning_rate(self) -> float:
        """The configured rate, scaled from the reference batch to the real one by the rule."""
        config = self.config.optimizer
        ratio = self.samples_per_step / config.reference_batch
        return (
            config.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.scale_rule]
        )

    def _set_learning_rates(self) -> None:
        rate, own = self.learning_rate(), self.config.loss.adversarial.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.discriminator is not None:
            for group in self.disc_optimizer.param_groups:
                group["lr"] = rate * own / self.config.optimizer.learning_rate if own else rate

    # ---------------------------------------------------------------- what is written down

    def log(self) -> dict[str, str]:
        """Write the means over the window and over all ranks; returns the few that the progress bar shows."""
        self._report_bad_steps()
        values, rate = self.journal.close_window(self.step)
        values |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": rate * self.samples_per_step,
        }
        self.journal.write(self.step, self.samples, {f"train/{name}": v for name, v in values.items()})
        shown = [
            name for name in ("loss", "reconstruction", "kl", "perceptual", "adversarial") if name in values
        ]
        return {n: f"{values[n]:.4g}" for n in shown} | {"images/s": f"{values['images_per_second']:.3g}"}

    def _note_bad_step(self, terms: dict[str, Tensor]) -> None:
        """Remember whether the step was skipped, on the device."""
        norms = [terms[n] for n in ("gradient_norm", "discriminator/gradient_norm") if n in terms]
        bad = ~torch.stack(norms).isfinite().all()
        self.bad_steps.append({"step": self.step, "samples": self.samples, "bad": bad})
        limit = self.config.train.max_bad_steps
        if len(self.bad_steps) >= limit and self.step % limit == 0:
            self._report_bad_steps()

    def _report_bad_steps(self) -> None:
        """Write down the skipped steps since the last report; too many in a row end the run."""
        flags = torch.stack([entry["bad"] for entry in self.bad_steps]).tolist() if self.bad_steps else []
        most = 0
        for entry, bad in zip(self.bad_steps, flags, strict=True):
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            most = max(most, self.bad_in_a_row)
            if bad:
                self.bad_total += 1
                end = entry["samples"]  # a step takes the next samples of the one order, over all ranks
                samples = list(range(end - self.samples_per_step, end))
                self.say(f"step {entry['step']} skipped: its gradient is not finite (samples {samples})")
                values = {"skipped_samples": samples, "train/skipped_steps": self.bad_total}
                self.journal.write(entry["step"], end, values)
        self.bad_steps.clear()
        if most >= self.config.train.max_bad_steps:
            self.save()
            self.accelerator.end_training()
            raise TooManyBadSteps(
                f"{most} steps in a row had gradients that are not finite (train.max_bad_steps); "
                f"saved at step {self.step}. Lower the learning rate, or look at the samples that are named above"
            )

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out images for the weights that would be exported; writes the picture."""
        images, batch = self.held_out, self.config.validation.batch_size
        share = images[self.accelerator.process_index :: self.accelerator.num_processes]
        names = ["psnr", "ssim"] + ["lpips"] * (self.lpips is not None)
        totals = torch.zeros(len(names), device=self.device)
        if len(share):
            reconstructions = validation.reconstruct(self.exported, share, batch)
            values = validation.measure(reconstructions, share, self.lpips, batch)
            totals += torch.stack([values[name].sum() for name in names]).to(totals)
        means = (self.accelerator.reduce(totals, "sum") / len(images)).tolist()
        metrics = dict(zip(names, means, strict=True))
        self.journal.write(self.step, self.samples, {f"validation/{n}": v for n, v in metrics.items()})
        if self.is_main:
            shown = images[: self.config.validation.pictures]
            validation.save_pictures(self.picture, shown, validation.reconstruct(self.exported, shown, batch))
            self.journal.show("validation/pictures", self.picture, self.step)
        return metrics

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step-{self.step:06d}.png"

    # ---------------------------------------------------------------- checkpoints and export

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        self._report_bad_steps()  # the steps before this one will not be taken again
        self._gather_skipped()
        if self.is_main:
            root, config = self.folder / "checkpoints", self.config.checkpoint
            tensors = {"model": self.unwrapped.state_dict()}
            tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer)
            if self.ema is not None:
                tensors["ema"] = self.ema.vae.state_dict()
            if self.discriminator is not None:
                tensors["discriminator"] = self.accelerator.unwrap_model(self.discriminator).state_dict()
                tensors["discriminator_optimizer"] = checkpoint.optimizer_tensors(self.disc_optimizer)
                tensors["lecam"] = {"anchors": self.lecam_anchors}
            scaler = self.accelerator.scaler
            state = {
                "samples": self.samples,
                "bad_total": self.bad_total,
                "bad_in_a_row": self.bad_in_a_row,
                "skipped": self.skipped.reasons,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoint.save_checkpoint(root, self.step, tensors, state)
            checkpoint.rotate(root, config.keep_last, config.keep_every)
        self.accelerator.wait_for_everyone()

    def _gather_skipped(self) -> None:
        """The unreadable images that each rank has met, to all of them."""
        for name, reason in gather_object(list(self.skipped.reasons.items())):
            self.skipped.reasons[name] = reason

    def _resume(self) -> None:
        self.bad_total = self.bad_in_a_row = 0
        path = checkpoint.newest(self.folder / "checkpoints", self.say) if self.is_main else None
        [path] = broadcast_object_list([path])
        if path is None:
            self.journal.forget_after(-1)  # of a run that was killed before its first checkpoint
            return
        tensors, state = checkpoint.load_checkpoint(path)
        try:
            self._load(tensors)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another configuration: {error}".replace("\n", " ")) from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.samples = state["step"], state["samples"]
        self.bad_total, self.bad_in_a_row = state["bad_total"], state["bad_in_a_row"]
        self.skipped.reasons.update(state["skipped"])
        self.journal.forget_after(self.step)
        self.say(f"continuing from {path} ({self.samples:,} samples)")

    def _load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.unwrapped.load_state_dict(tensors["model"])
        checkpoint.load_optimizer(self.optimizer, tensors["optimizer"])
        if self.ema is not None:
            self.ema.vae.load_state_dict(tensors["ema"])
        if self.discriminator is not None and "discriminator" in tensors:
            self.accelerator.unwrap_model(self.discriminator).load_state_dict(tensors["discriminator"])
            checkpoint.load_optimizer(self.disc_optimizer, tensors.get("discriminator_optimizer", {}))
            self.lecam_anchors = tensors["lecam"]["anchors"].to(self.device)

    def finish(self, before: dict) -> dict:
        """Measure and export the final weights."""
        after = self.validate()
        facts = {"before": before, "after": after, "samples": self.samples, "held_out": len(self.held_out)}
        facts["statistics"] = self.measure_latents()
        if not self.config.train.decoder_only:  # else the latents are those of the pretrained encoder
            self.exported.register_to_config(scaling_factor=facts["statistics"].scaling_factor)
        if self.is_main:
            export(self.folder / "export", self.exported, self.config, facts)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return {"before": before, "after": after, "picture": self.picture, "export": self.folder / "export"}

    @torch.no_grad()
    def measure_latents(self) -> LatentStatistics:
        """Statistics of the latents of the first samples of the training data, over all ranks."""
        statistics = LatentStatistics(self.vae.config.latent_channels)
        share = -(-STATISTICS_SAMPLES // (self.config.data.batch_size * self.accelerator.num_processes))
        for batch, _ in zip(self._loader(start_sample=0), range(share), strict=False):
            posterior = self.exported.encode(batch["images"].to(self.device, self.exported.dtype)).latent_dist
            statistics.update(posterior.mean + posterior.std * self._noise(batch["sample"]))
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

    @property
    def exported(self) -> KLAutoencoder:
        return self.vae if self.ema is None else self.ema.vae

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

    def _load_perceptual(self) -> None:
        """The perceptual term, and LPIPS for validation if its weights are to be had."""
        config, self.perceptual, self.lpips = self.config.loss.perceptual, None, None
        with self.accelerator.main_process_first():  # one download, not one a rank
            try:
                if config.weight:
                    self.perceptual = LPIPS(config.net).to(self.device, memory_format=torch.channels_last)
            except FileNotFoundError as error:
                if config.required:
                    hint = "or train without the term: loss.perceptual.weight=0"
                    raise FileNotFoundError(f"{error}; {hint}") from None
                self.say(f"WARNING: training WITHOUT the perceptual term, results will be blurred. {error}")
            try:
                self.lpips = LPIPS(self.config.validation.lpips_net).to(self.device)
            except FileNotFoundError as error:
                self.say(f"validation reports no LPIPS. {error}")

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.vae = build_autoencoder(config.model).to(memory_format=torch.channels_last)
        for key in ("resolution", "validation_resolution"):
            size, f = getattr(config.data, key), self.vae.downsampling
            if size and (size % f or size < 16):  # SSIM's window has 11 pixels
                raise ValueError(
                    f"data.{key}: {size}; allowed: a multiple of the network's downsampling, {f}, from 16 on"
                )
        learn_scale = config.loss.reconstruction in losses.LEARNED_SCALE
        self.unwrapped = TrainedModel(self.vae, learn_scale, config.train.decoder_only).to(self.device)
        self.ema = MovingAverage(self.vae, config.ema.decay) if config.ema.enabled else None
        if config.train.gradient_checkpointing == "blocks":
            self.vae.enable_gradient_checkpointing()
        for block in self.vae.modules():
            if isinstance(block, ResnetBlock):
                block.recompute_norms = config.train.gradient_checkpointing == "norms"
        if config.train.compile:
            for network in (
                self.vae.encoder,
                self.vae.decoder,
                self.perceptual and self.perceptual.lpips.net,
            ):
                if network is not None:
                    network.compile()
        self.parameters = [p for p in self.unwrapped.parameters() if p.requires_grad]
        self.model, self.optimizer = self.accelerator.prepare(self.unwrapped), self._adamw(self.parameters)
        self.discriminator = None
        if config.loss.adversarial.weight:
            self._build_discriminator()

    def _build_discriminator(self) -> None:
        config = self.config.loss.adversarial
        network = PatchDiscriminator(self.vae.config.out_channels, config.channels, config.layers)
        if self.config.data.resolution < network.smallest_side:
            raise ValueError(
                f"data.resolution: {self.config.data.resolution}; allowed: at least {network.smallest_side} for a "
                f"discriminator of loss.adversarial.layers={config.layers}"
            )
        network = network.to(self.device, memory_format=torch.channels_last)
        self.disc_parameters = list(network.parameters())
        self.discriminator = self.accelerator.prepare(network)
        self.disc_optimizer = self._adamw(self.disc_parameters)
        self.lecam_anchors = torch.zeros(2, device=self.device)
        self.logit_means: list[Tensor] = []  # of real and fake, a micro-batch

    def _adamw(self, parameters: list[Tensor]) -> torch.optim.AdamW:
        config = self.config.optimizer
        return torch.optim.AdamW(
            parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )

    def _profiler(self):
        """A torch profiler of five steps that writes a trace and a table; nothing unless train.profile is on."""
        if not (self.config.train.profile and self.is_main):
            return contextlib.nullcontext(_NoProfiler)
        from .profiling import profiler

        return profiler(self.folder / "profile", self.say)

    def _announce(self) -> None:
        config, accelerator = self.config, self.accelerator
        parameters, ranks = sum(p.numel() for p in self.parameters), accelerator.num_processes
        self.say(
            f"{self.folder}: {parameters:,} trainable parameters on {ranks} x {self.device.type}, "
            f"{config.train.mixed_precision} mixed precision\n"
            f"batch {self.samples_per_step} = {config.data.batch_size} x {ranks} ranks x "
            f"{config.train.gradient_accumulation} accumulated; {config.train.steps} steps = "
            f"{config.train.steps * self.samples_per_step:,} samples\n"
            f"learning rate {self.peak_learning_rate():.3g} ({config.optimizer.learning_rate:.3g} for a batch of "
            f"{config.optimizer.reference_batch}, rule: {config.optimizer.scale_rule})"
        )


class _NoProfiler:
    @staticmethod
    def step() -> None: ...
