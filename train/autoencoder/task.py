"""`AutoencoderTask`: train an autoencoder; its networks, a step, validation, the export."""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.profiler import record_function

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.evaluation.metrics import LPIPS
from kl_autoencoder.latents.statistics import LatentStatistics
from kl_autoencoder.models.autoencoder import Autoencoder
from kl_autoencoder.models.autoencoder_kl import ExactAutoencoder
from kl_autoencoder.models.scaling import patchify
from kl_autoencoder.networks.bottlenecks import AdversarialBottleneck, Bottleneck

from ..data.training_data import TrainingData
from ..loop.context import RunContext
from ..loop.player import MovingAverage, Player, Tensors
from ..loop.task import Grouped
from ..parts import BOTTLENECKS, TERMS, VIEWS, Draws, Term
from ..parts.draws import POSTERIOR_NOISE
from . import size, validation
from .adversarial.adversary import Adversary
from .adversarial.latent_adversary import LatentAdversary
from .export import check_push, export, push
from .likelihoods import LEARNED_SCALE
from .model import TrainedModel, allow_compilations, build_autoencoder, choose_backward
from .objective import Objective

STATISTICS_SAMPLES = 512  # crops to measure the scaling factor on: accurate to 0.5 % at f8 and 256 pixels
ANALYSED_SAMPLES = 64  # crops to find the principal components on, if the model is to have fewer latents
SKIPPED_SHOWN = 5  # at most so many unreadable held-out images are named


class AutoencoderTask:
    """Trains an autoencoder and, if the configuration has them, discriminators of images and of latents.

    Each network has a `Player` of its own, and no gradient reaches another player's network. Creating a task raises
    ValueError or FileNotFoundError, which names the key, for networks, crops or data that cannot be used and for
    what memory cannot hold. statistics_samples: crops to measure the latents on, None for STATISTICS_SAMPLES.
    """

    shown = ("loss", "reconstruction", "kl", "perceptual", "adversarial")

    def __init__(self, run: RunContext, statistics_samples: int | None = None):
        self.run, self.config = run, run.config
        self.statistics_samples = statistics_samples or STATISTICS_SAMPLES
        self.memory = size.device_memory(run.device)
        size.check_weights(self.config, self.memory)
        perceptual, self.lpips = self._load_perceptual()
        terms = self._build_terms()
        torch.manual_seed(self.config.seed)
        model = self._build_model(perceptual, terms)
        self.configured_terms = terms
        self.autoencoder = Player(model, run, run.learning_rate)
        check_push(self.config.export, self.vae)
        self.adversary = None
        if self.config.loss.adversarial.weight:
            self.adversary = Adversary(run, self.vae.config.out_channels, self.vae.decoder.conv_out)
        self.latent_adversary = None
        if isinstance(model.bottleneck, AdversarialBottleneck):
            self.latent_adversary = LatentAdversary(run, self.vae.config.latent_channels, model.bottleneck)
            terms = [*terms, self.latent_adversary.term]
        others = [adversary.player for adversary in (self.adversary, self.latent_adversary) if adversary]
        self.players = [self.autoencoder, *others]
        self.objective = Objective(self.config.loss, perceptual, terms, self.adversary)
        self._check_resolutions()
        classes = self.vae.config.get("classes") or None
        self.data = TrainingData(
            self.config.data, self.config.seed, classes, self.vae.size_multiple, self.run.samples_per_step
        )
        if sizes := self.data.announced():
            self.run.say(sizes)
        if self.config.train.compile:
            allow_compilations(self.data.number_of_sizes)
        size.check_step(self.config, self.vae.config, self.memory)

    @property
    def exported(self) -> KLAutoencoder:
        return self.vae if self.ema is None else self.ema.network

    def ready(self) -> None:
        """Read this rank's share of the held-out images; start a bottleneck that is initialised from data."""
        self.held_out, self.held_out_images = self._read_held_out()
        if wanted := self.model.bottleneck.wants_start():
            self.model.bottleneck.start(self._first_moments(wanted), self.config.seed)
            self._restart_average()

    # ---------------------------------------------------------------- one step

    def playing(self, step: int) -> Sequence[Player]:
        idle = self.adversary.player if self.adversary and not self._discriminates(step) else None
        return [player for player in self.players if player is not idle]

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Train the autoencoder and the discriminators that play in `step` on one micro-batch of `TrainingData`."""
        images = batch["images"].to(self.run.device, memory_format=torch.channels_last, non_blocking=True)
        draws = Draws(self.config.seed, batch["sample"], self.run.device, step=step)
        noise = self.noise(batch)
        terms, reconstruction, targets, z = self.autoencoder_step(
            step, images, noise, draws, self.labels(batch)
        )
        if self._discriminates(step):
            terms |= self.adversary.micro_batch(step, targets, reconstruction)
        if self.latent_adversary is not None:
            terms |= self.latent_adversary.micro_batch(z, noise)
        return terms

    def autoencoder_step(
        self,
        step: int,
        images: Tensor,
        noise: Tensor,
        draws: Draws | None = None,
        labels: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Train the autoencoder on one micro-batch; arguments as of `TrainedModel.forward`.

        Returns the terms to log, the reconstruction (detached), its targets, (B, C, H, W) each, and the latents
        (detached), (B, C, h, w).
        """
        self.model.bottleneck.begin_step(step)
        with record_function("autoencoder"):
            output = self.autoencoder.network(images, noise, draws, labels)
        loss, terms, reconstruction = self.objective(step, output, draws)
        with record_function("autoencoder"):
            self.autoencoder.backward(loss, watched=terms["loss"])
        terms |= self.autoencoder.update()
        if (step + 1) % self.config.log.every == 0:
            terms |= output.code.facts()
        return terms, reconstruction, output.targets, output.code.z.detach()

    def end_step(self, step: int) -> None:
        """Update a code book by its averages, and the moving average; `step` is the number of steps taken."""
        self.model.bottleneck.end_step(self.run.accelerator.gather)
        if self.ema is not None:
            with record_function("optimizer"):
                self.ema.update(self.vae, step)

    def noise(self, batch: dict) -> Tensor:
        """The bottleneck's standard normal noise, (B, *noise_shape): a function of seed and sample number alone."""
        sides = (side // self.vae.downsampling for side in batch["images"].shape[2:])
        latent = (self.vae.config.latent_channels, *sides)
        draws = Draws(self.config.seed, batch["sample"], self.run.device, POSTERIOR_NOISE)
        return draws.normal(*self.model.bottleneck.noise_shape(latent))

    def labels(self, batch: dict) -> Tensor | None:
        """The labels (B,) of a batch on the device; None if the model has no classes.

        Raises ValueError if the model has classes, but the data has no labels.
        """
        if not self.vae.config.get("classes"):
            return None
        if "labels" not in batch:
            raise ValueError(
                f"model.classes: {self.vae.config.classes}, but {self.config.data.train} has no labels; allowed: "
                "with data.label_column or data.labels"
            )
        return batch["labels"].to(self.run.device, non_blocking=True)

    def _discriminates(self, step: int) -> bool:
        return self.adversary is not None and self.adversary.plays(step)

    # ---------------------------------------------------------------- validation and export

    def validate(self) -> dict[str, float]:
        """Mean PSNR (dB), SSIM and, if its weights are there, LPIPS of the held-out images of all ranks."""
        values: dict[str, list[float]] = {}
        for share in gather_object([validation.measure(self.exported, self.held_out, self.lpips)]):
            for name, of_share in share.items():
                values.setdefault(name, []).extend(of_share)
        return {name: math.fsum(of_all) / len(of_all) for name, of_all in values.items()}

    def save_pictures(self, path: Path) -> bool:
        """Write originals, reconstructions and differences of the first held-out images of this rank."""
        if len(self.held_out):
            shown = self.held_out.first(self.config.validation.pictures)
            validation.save_pictures(path, self.exported, shown)
        return len(self.held_out) > 0

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        """Measure the statistics of the latents; set the model's scaling by them, unless it is fixed."""
        statistics = self.measure_latents(grouped)
        fixed_by_term = any(term.scaling_factor for term in self.configured_terms)
        keeps_latents = self.config.train.decoder_only
        if not (fixed_by_term or keeps_latents):
            self.exported.set_scaling(statistics)
        return {"held_out": self.held_out_images, "statistics": statistics}

    @torch.no_grad()
    def measure_latents(self, grouped: Grouped) -> LatentStatistics:
        """Statistics of each channel of the latents of the first training samples, over all ranks.

        For a model that normalises patches of latents, each position in a patch is a channel of its own.
        """
        patch = self.exported.scaling.get("patch_size")
        statistics = LatentStatistics(self.exported.config.latent_channels * math.prod(patch or (1,)))
        groups = -(-self.statistics_samples // (self.config.data.batch_size * self.run.ranks))
        loader = self.data.loader(0, self.run.rank, self.run.ranks, self.run.device)
        for [batch] in grouped(loader, groups, 1):
            latents = self.latents(batch)
            statistics.update(patchify(latents, patch))
        return statistics.reduced(lambda total: self.run.accelerator.reduce(total.to(self.run.device), "sum"))

    @torch.no_grad()
    def latents(self, batch: dict) -> Tensor:
        """A batch of `TrainingData` -> latents (B, C, h, w) of the exported model, sampled as in training."""
        images, noise = batch["images"], self.noise(batch)
        return self._bottleneck(self.exported)(self._moments(batch), noise, images[0].numel()).z

    def _moments(self, batch: dict) -> Tensor:
        vae, labels = self.exported, self.labels(batch)
        condition = () if labels is None else (labels,)
        return vae.moments(batch["images"].to(self.run.device, vae.dtype), *condition)

    def _bottleneck(self, vae: nn.Module) -> Bottleneck:
        """The bottleneck of `vae`, or for a KL autoencoder the one that training has beside it."""
        return vae.bottleneck_module if isinstance(vae, Autoencoder) else self.model.bottleneck

    @torch.no_grad()
    def _first_moments(self, wanted: int) -> Tensor:
        """Encoder outputs at single positions, of the first samples of the run: (wanted, channels), float32.

        All ranks read the same samples.
        """
        vectors: list[Tensor] = []
        for batch in self.data.loader(0, 0, 1, self.run.device):
            h = self._moments(batch)
            vectors.append(h.movedim(1, -1).flatten(0, 2).float())
            if sum(map(len, vectors)) >= wanted:
                break
        return torch.cat(vectors)[:wanted]

    def _restart_average(self) -> None:
        """Restart the moving average from the present weights."""
        if self.ema is not None:
            self.ema.network.load_state_dict(self.vae.state_dict())

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        kept = self.adversary.tensors() if self.config.export.training_state else None
        export(folder, self.exported, self.config, facts, kept, self._save_learned)
        if self.config.export.push_to:
            self.run.say(f"published {push(self.exported, folder, self.config.export)}")

    def _save_learned(self, folder: Path) -> None:
        """Write what the layers of terms have learned into `folder`, or say why it cannot be written."""
        for term in self.configured_terms:
            try:
                if term.save:
                    term.save(self.model.learned[term.name], folder)
            except ValueError as error:
                self.run.say(f"WARNING: the term {term.name} exports nothing: {error}")

    # ---------------------------------------------------------------- checkpoints

    def tensors(self) -> Tensors:
        """Everything that the next step depends on: weights, average, optimizers, discriminators."""
        tensors = self.autoencoder.tensors()
        if self.ema is not None:
            tensors["ema"] = self.ema.network.state_dict()
        for adversary in (self.adversary, self.latent_adversary and self.latent_adversary.player):
            tensors |= adversary.tensors() if adversary else {}
        return tensors

    def load(self, tensors: Tensors) -> None:
        """Load what `tensors` returned; a moving average that is not among them starts from the weights."""
        self.autoencoder.load(tensors)
        if self.ema is not None:
            self.ema.network.load_state_dict(tensors["ema"] if "ema" in tensors else self.vae.state_dict())
        if self.adversary is not None and "discriminator" in tensors:
            self.adversary.load(tensors)
        if self.latent_adversary is not None:
            self.latent_adversary.player.load(tensors)
        if self.ema is not None and "ema" not in tensors:
            self.run.say(
                "ema.enabled: the run had no moving average so far; it starts from the weights of this step"
            )
        if self.ema is None and "ema" in tensors:
            self.run.say(
                "ema.enabled: false; the moving average so far ends here, the weights themselves are exported"
            )

    def counted_in_steps(self) -> dict[str, int]:
        if self.adversary is None:
            return {}
        return {"loss.adversarial.disc_start": self.config.loss.adversarial.disc_start}

    # ---------------------------------------------------------------- setting up

    def _build_terms(self) -> list[Term]:
        with self.run.accelerator.main_process_first():  # so that only one rank downloads
            terms = [TERMS.build(term, self.config) for term in self.config.loss.terms]
        names = [term.name for term in terms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"loss.terms: {min(twice)} is there twice; allowed: each term once")
        return terms

    def _build_model(self, perceptual: LPIPS | None, terms: list[Term]) -> TrainedModel:
        """Build the autoencoder with bottleneck and view, on the device; compile it and LPIPS if configured."""
        config = self.config
        vae = build_autoencoder(config.model, config.data.channels, self._latents_to_analyse)
        self.vae = vae.to(memory_format=torch.channels_last)
        _fix_scaling(self.vae, terms)
        learn_scale = config.loss.reconstruction in LEARNED_SCALE
        bottleneck = BOTTLENECKS.build(config.model.bottleneck, config)
        view = VIEWS.build(config.loss.view, config)
        channels = self.vae.config.latent_channels
        learned = {term.name: term.learned(channels) for term in terms if term.learned}
        switches = {"denoising": config.loss.denoising, "label_dropout": config.model.label_dropout}
        decoder_only = config.train.decoder_only
        model = TrainedModel(self.vae, bottleneck, view, learn_scale, decoder_only, learned, **switches)
        self.model = model.to(self.run.device)
        self.ema = MovingAverage(self.vae, config.ema.decay) if config.ema.enabled else None
        choose_backward(self.vae, config.train.gradient_checkpointing)
        if config.train.compile:
            model.compile_networks()
            if perceptual is not None:
                perceptual.lpips.net.compile()
        return model

    @torch.no_grad()
    def _latents_to_analyse(self, vae: ExactAutoencoder) -> Tensor:
        """Encode the first samples of the run, the same on all ranks: latents (N, C) at N positions, on the CPU."""
        data = TrainingData(self.config.data, self.config.seed, None, vae.size_multiple)
        vae, vectors = vae.eval().to(self.run.device), []
        batches = -(-ANALYSED_SAMPLES // data.config.batch_size)
        for batch in islice(data.loader(0, 0, 1, self.run.device), batches):
            means = vae.encode(batch["images"].to(self.run.device)).latent_dist.mean
            vectors.append(means.movedim(1, -1).flatten(0, 2).float().cpu())
        vae.cpu()
        return torch.cat(vectors)

    def _load_perceptual(self) -> tuple[LPIPS | None, LPIPS | None]:
        """Load LPIPS for the perceptual term and for validation; None for the first if its weight is 0.

        If LPIPS's own weights cannot be found, either is None, with a warning; but FileNotFoundError is raised for
        the perceptual term if it is `required`.
        """
        config, perceptual, lpips = self.config.loss.perceptual, None, None
        with self.run.accelerator.main_process_first():  # so that only one rank downloads
            try:
                if config.weight:
                    perceptual = LPIPS(config.net, config.bf16).to(
                        self.run.device, memory_format=torch.channels_last
                    )
            except FileNotFoundError as error:
                if config.required:
                    hint = "or train without the term: loss.perceptual.weight=0"
                    raise FileNotFoundError(f"{error}; {hint}") from None
                self.run.say(
                    f"WARNING: training WITHOUT the perceptual term, results will be blurred. {error}"
                )
            try:
                lpips = LPIPS(self.config.validation.lpips_net).to(self.run.device)
            except FileNotFoundError as error:
                self.run.say(f"validation reports no LPIPS. {error}")
        return perceptual, lpips

    def _check_resolutions(self) -> None:
        data, f, is_mlp = self.config.data, self.vae.size_multiple, getattr(self.vae, "is_mlp", False)
        sides = [("resolution", side) for side in data.resolutions]
        for key, side in [*sides, ("validation_resolution", data.validation_resolution)]:
            if side and side % f:
                raise ValueError(
                    f"data.{key}: {side}; allowed: a multiple of the network's downsampling, {f}"
                )
            if side and is_mlp and side != f:
                raise ValueError(f"data.{key}: {side}; allowed for an mlp: {f}, as model.sample_size says")
        if data.buckets and is_mlp:
            raise ValueError("data.buckets: true; allowed for an mlp: false, its images have one size")
        validation.check_perceptual(self.config)
        self.lpips = validation.fitting_lpips(self.config, self.lpips, self.run.say)
        self._check_smaller_images()

    def _check_smaller_images(self) -> None:
        """Refuse a view that makes images too small for the discriminator, or that turns images of any shape."""
        if not hasattr(self.model.view, "smallest_side"):
            return
        if self.config.data.buckets:
            kind = self.config.loss.view.kind
            raise ValueError(
                f"data.buckets: true; allowed with loss.view.kind={kind}, which turns images: false"
            )
        smallest = min(
            self.model.view.smallest_side(side, self.vae.downsampling)
            for side in self.config.data.resolutions
        )
        needed = self.adversary.player.module.smallest_side if self.adversary else 0
        if smallest < needed:
            raise ValueError(
                f"loss.view.smallest_side: {self.config.loss.view.smallest_side}; allowed: at least {needed} for a "
                f"discriminator of loss.adversarial.layers={self.config.loss.adversarial.layers}"
            )

    def _read_held_out(self) -> tuple[validation.HeldOut, int]:
        """Read this rank's share of the held-out images; returns it, and the number of images over all ranks."""
        rank, ranks, say = self.run.rank, self.run.ranks, self.run.say
        photographs = self.data.held_out()
        share = -(-photographs.count // ranks)
        size.check_held_out(share, photographs.size, self.memory, photographs.channels)
        held_out = validation.HeldOut(photographs, self.config.validation.batch_size, rank, ranks)
        shares = gather_object([(len(held_out), photographs.skipped)])
        skipped = sorted(pair for _, share in shares for pair in share.items())
        for number, why in skipped[:SKIPPED_SHOWN]:
            say(f"skipped held-out image {number}: {why}")
        if len(skipped) > SKIPPED_SHOWN:
            say(f"skipped {len(skipped)} held-out images in all")
        total = sum(count for count, _ in shares)
        if not total:
            raise ValueError(f"data.validation: no readable images in {photographs.source}")
        return held_out, total


def _fix_scaling(vae: nn.Module, terms: list[Term]) -> None:
    """Set the scaling_factor that a term fixes. Raises ValueError for a model with another kind of scaling."""
    for term in terms:
        if term.scaling_factor is None:
            continue
        if "patch_size" in vae.scaling:
            raise ValueError(
                f"loss.terms: {term.name} with an AutoencoderKLFlux2; allowed: with models that scaling_factor "
                "alone scales"
            )
        vae.register_to_config(
            scaling_factor=term.scaling_factor, shift_factor=None, latents_mean=None, latents_std=None
        )
