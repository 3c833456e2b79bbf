"""The training loop: one optimizer step, and what happens around it."""

import copy
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.latents import LatentStatistics
from kl_autoencoder.metrics import LPIPS

from . import checkpoint, data, losses, validation
from .config import Config, ModelConfig, to_yaml
from .export import export

# what a stream of random numbers is for, beside the seed and the sample that it is keyed by
POSTERIOR_NOISE = 1
STATISTICS_SAMPLES = 512  # crops from which the scaling factor is measured: 0.5 % of its value at f8 and 256


def build_autoencoder(config: ModelConfig) -> KLAutoencoder:
    """A new network, or the pretrained one: a folder or hub id in diffusers' layout, or an LDM single file."""
    if config.pretrained is None:
        return KLAutoencoder(**config.network())
    if Path(config.pretrained).is_file():
        return KLAutoencoder.from_single_file(config.pretrained, torch_dtype=torch.float32)
    return KLAutoencoder.from_pretrained(
        config.pretrained, subfolder=config.subfolder, torch_dtype=torch.float32
    )


class TrainedModel(nn.Module):
    """What the optimizer moves and DDP wraps: the autoencoder and the scale of its likelihood.

    `forward` returns all that the loss needs, so that no wrapper is ever bypassed.
    """

    def __init__(self, vae: KLAutoencoder, learn_scale: bool, decoder_only: bool):
        super().__init__()
        self.vae = vae
        self.log_scale = nn.Parameter(torch.zeros(())) if learn_scale else None
        self.decoder_only = decoder_only
        if decoder_only:
            frozen = [vae.encoder] if vae.quant_conv is None else [vae.encoder, vae.quant_conv]
            for module in frozen:
                module.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor):
        """Images (B, 3, H, W), noise (B, C, h, w) -> reconstruction, posterior, log scale or None."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            posterior = self.vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise  # reparameterised, Kingma & Welling 2013, section 2.4
        return self.vae.decode(z.to(posterior.mean.dtype)).sample, posterior, self.log_scale


class Trainer:
    """Everything a run holds. Making one reads the data, builds the model and finds what there is to resume."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.output_dir)
        if config.train.mixed_precision == "fp16" and PartialState().device.type == "cpu":
            raise ValueError("train.mixed_precision: fp16 on a CPU; allowed there: no, bf16")
        self.accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.gradient_accumulation,
            log_with="tensorboard" if config.log.tensorboard else None,
            project_dir=self.folder,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device = self.accelerator.device
        ranks = self.accelerator.num_processes
        self.samples_per_step = config.data.batch_size * ranks * config.train.gradient_accumulation
        self.step = 0
        self._prepare_folder()
        self._load_perceptual()
        self._build()
        self._resume()
        self.loader = self._loader(self.samples)
        self.held_out = data.validation_images(config.data)
        self.skipped = data.SkippedImages()
        self._start_window()

    @property
    def samples(self) -> int:
        """Samples consumed so far: the position in the data."""
        return self.step * self.samples_per_step

    # ---------------------------------------------------------------- the loop

    def fit(self) -> dict:
        """Train to the last step and export; returns what the run amounts to."""
        config = self.config
        self._announce()
        before = self.validate() if self.step == 0 else self._recorded_start()
        progress = tqdm(total=config.train.steps, initial=self.step, unit="step", disable=not self.is_main)
        self._start_window()
        for micro_batches in self.batches():
            self.train_step(micro_batches)
            progress.update()
            if self.step % config.log.every == 0 or self.step == config.train.steps:
                progress.set_postfix(self.log())
            if config.validation.every and self.step % config.validation.every == 0 and not self.finished:
                self.validate()
            if self.step % config.checkpoint.every == 0 or self.finished:
                self.save()
        progress.close()
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
            yield [next(loader) for _ in range(self.config.train.gradient_accumulation)]

    def _loader(self, start_sample: int):
        return data.train_loader(
            self.config.data,
            seed=self.config.seed,
            start_sample=start_sample,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def train_step(self, micro_batches: list[dict]) -> None:
        """One step of the optimizer: forward and backward for each micro-batch, clip, update, average."""
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                terms = self.objective(batch)
                self.accelerator.backward(terms["loss"])
                if self.accelerator.sync_gradients:
                    clip = self.config.optimizer.gradient_clip or math.inf
                    terms["gradient_norm"] = self.accelerator.clip_grad_norm_(self.parameters, clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self._count(terms)
            self.skipped.add(batch["skipped"])
        self.step += 1
        self._update_ema()

    def objective(self, batch: dict) -> dict[str, Tensor]:
        """The loss of a batch and its terms, as tensors."""
        config = self.config.loss
        images = batch["images"].to(self.device, memory_format=torch.channels_last, non_blocking=True)
        reconstruction, posterior, log_scale = self.model(images, self._noise(batch["sample"]))
        nll = losses.reconstruction_nll(config.reconstruction, reconstruction, images, log_scale).mean()
        kl = losses.kl_per_dimension(posterior, images[0].numel(), config.kl.free_bits).mean()
        loss = nll + config.kl.weight * losses.ramp(self.step, config.kl.warmup_steps) * kl
        terms = {"reconstruction": nll, "kl": kl}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images).mean()
            loss = loss + config.perceptual.weight * terms["perceptual"]
        if log_scale is not None:
            terms["log_scale"] = log_scale
        return {"loss": loss, **terms}

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

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema is None:
            return
        decay = min(self.config.ema.decay, (1 + self.step) / (10 + self.step))  # the start is forgotten soon
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.vae.parameters()), 1 - decay)

    # ---------------------------------------------------------------- what is written down

    def _start_window(self) -> None:
        self.window, self.window_start = {}, (time.perf_counter(), self.step)

    def _count(self, terms: dict[str, Tensor]) -> None:
        """Add to the sums of the window since the last log line; nothing leaves the device."""
        for name, value in terms.items():
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + value.detach().float(), count + 1)

    def log(self) -> dict[str, str]:
        """Write the means over the window and over all ranks; returns the few that the progress bar shows."""
        names = list(self.window)
        means = torch.stack([total / count for total, count in self.window.values()])
        means = self.accelerator.reduce(means, "mean").tolist()
        start, first = self.window_start
        rate = (self.step - first) * self.samples_per_step / (time.perf_counter() - start)
        values = dict(zip(names, means, strict=True))
        values |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "images_per_second": rate}
        self._record({f"train/{name}": value for name, value in values.items()})
        self._start_window()
        return {name: f"{values[name]:.4g}" for name in ("loss", *names[1:4])} | {"images/s": f"{rate:.3g}"}

    def _record(self, values: dict[str, float]) -> None:
        if not self.is_main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "samples": self.samples, **values}) + "\n")
        self.accelerator.log(values, step=self.step)

    def validate(self) -> dict[str, float]:
        """Metrics of the held-out images for the weights that would be exported; writes the picture."""
        images, batch = self.held_out, self.config.validation.batch_size
        share = images[self.accelerator.process_index :: self.accelerator.num_processes]
        sums: dict[str, Tensor] = {}
        if len(share):
            reconstructions = validation.reconstruct(self.exported, share, batch)
            values = validation.measure(reconstructions, share, self.lpips, batch)
            sums = {name: value.sum().float() for name, value in values.items()}
        names = ["psnr", "ssim"] + ["lpips"] * (self.lpips is not None)
        totals = torch.stack([sums.get(name, torch.zeros(())) for name in names]).to(self.device)
        means = (self.accelerator.reduce(totals, "sum") / len(images)).tolist()
        metrics = dict(zip(names, means, strict=True))
        self._record({f"validation/{name}": value for name, value in metrics.items()})
        if self.is_main:
            shown = images[: self.config.validation.pictures]
            reconstructions = validation.reconstruct(self.exported, shown, batch)
            validation.save_pictures(self.picture, shown, reconstructions)
            self._show(self.picture)
        return metrics

    def _show(self, picture: Path) -> None:
        if self.config.log.tensorboard:
            from PIL import Image

            writer = self.accelerator.get_tracker("tensorboard").writer
            grid = np.asarray(Image.open(picture))
            writer.add_image("validation/pictures", grid, self.step, dataformats="HWC")

    @property
    def picture(self) -> Path:
        return self.folder / "samples" / f"step-{self.step:06d}.png"

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        if self.is_main:
            root, config = self.folder / "checkpoints", self.config.checkpoint
            tensors = {"model": self.unwrapped.state_dict()}
            tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer)
            if self.ema is not None:
                tensors["ema"] = self.ema.state_dict()
            checkpoint.save_checkpoint(root, self.step, tensors, {"samples": self.samples})
            checkpoint.rotate(root, config.keep_last, config.keep_every)
        self.accelerator.wait_for_everyone()

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
            noise = self._noise(batch["sample"])
            statistics.update(posterior.mean + posterior.std * noise)
        return statistics.reduced(lambda total: self.accelerator.reduce(total.to(self.device), "sum"))

    # ---------------------------------------------------------------- setting up

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    @property
    def exported(self) -> KLAutoencoder:
        return self.vae if self.ema is None else self.ema

    def _prepare_folder(self) -> None:
        if self.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "config.yaml").write_text(to_yaml(self.config))
            except OSError as error:
                raise ValueError(
                    f"output_dir: {self.folder} cannot be written to ({error.strerror})"
                ) from None
            if self.config.log.tensorboard:
                os.makedirs(self.folder / "logs", exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("logs")

    def _load_perceptual(self) -> None:
        """The perceptual term, and LPIPS for validation if its weights are to be had."""
        config, self.perceptual, self.lpips = self.config.loss.perceptual, None, None
        with self.accelerator.main_process_first():  # one download, not one a rank
            try:
                if config.weight:
                    self.perceptual = LPIPS(config.net).to(self.device)
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
        size, f = config.data.resolution, self.vae.downsampling
        if size % f:
            raise ValueError(
                f"data.resolution: {size}; allowed: a multiple of the network's downsampling, {f}"
            )
        learn_scale = config.loss.reconstruction in losses.LEARNED_SCALE
        self.unwrapped = TrainedModel(self.vae, learn_scale, config.train.decoder_only).to(self.device)
        self.ema = copy.deepcopy(self.vae).eval().requires_grad_(False) if config.ema.enabled else None
        if config.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if config.train.compile:
            self.vae.encoder.compile(fullgraph=True)
            self.vae.decoder.compile(fullgraph=True)
        self.parameters = [p for p in self.unwrapped.parameters() if p.requires_grad]
        options = config.optimizer
        optimizer = torch.optim.AdamW(
            self.parameters,
            options.learning_rate,
            options.betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.unwrapped, optimizer)

    def _resume(self) -> None:
        path = checkpoint.newest(self.folder / "checkpoints", self.say) if self.is_main else None
        [path] = broadcast_object_list([path])
        if path is None:
            return
        tensors, state = checkpoint.load_checkpoint(path)
        self.unwrapped.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        checkpoint.load_optimizer(self.optimizer, tensors["optimizer"])
        self.step = state["step"]
        self.say(f"continuing from {path}")

    def _recorded_start(self) -> dict[str, float]:
        """The metrics of the untrained network, as an earlier start of this run wrote them down."""
        with (self.folder / "metrics.jsonl").open() as file:
            for line in map(json.loads, file):
                if line["step"] == 0 and "validation/psnr" in line:
                    pairs = line.items()
                    return {k.removeprefix("validation/"): v for k, v in pairs if k.startswith("validation/")}
        return {}

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
