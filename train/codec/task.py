"""The task `entropy_model`: train the codec's networks to predict the rounded latents of a frozen autoencoder."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.profiler import record_function

from kl_autoencoder.codec.context_model import ContextModel
from kl_autoencoder.codec.steps import step_of
from kl_autoencoder.models.folder import ENTROPY_MODEL

from ..autoencoder.model import build_autoencoder
from ..autoencoder.validation import HeldOut
from ..config import EntropyModelConfig, ModelConfig
from ..data.training_data import TrainingData
from ..loop.context import RunContext
from ..loop.task import Grouped
from ..one_network.exporting import write_folder
from ..one_network.task import OneNetwork
from ..parts import Draws
from ..parts.rounding import entropy_network
from .card import card

MEASURED = (24, 40, 56, 72)  # qualities at which held-out images are measured


class EntropyTask(OneNetwork):
    """Trains a `ContextNetwork` to minimise the bits of rounded latents, at qualities drawn for each image.

    Creating it raises ValueError or FileNotFoundError, which names the key, if the autoencoder or the data cannot
    be used.
    """

    shown = ("loss",)

    def __init__(self, run: RunContext):
        config: EntropyModelConfig = run.config
        source = ModelConfig(pretrained=config.model.pretrained, subfolder=config.model.subfolder)
        vae = build_autoencoder(source, config.data.channels).to(
            run.device, memory_format=torch.channels_last
        )
        self.vae = vae.eval().requires_grad_(False)
        for side in config.data.resolutions:
            if side % vae.size_multiple:
                raise ValueError(f"data.resolution: {side}; allowed: a multiple of {vae.size_multiple}")
        torch.manual_seed(config.seed)
        channels = vae.config.latent_channels * (vae.size_multiple // vae.downsampling) ** 2
        network = entropy_network(config.model, channels, "model")
        super().__init__(run, network.to(memory_format=torch.channels_last))
        self.data = TrainingData(
            config.data, config.seed, multiple=vae.size_multiple, samples_per_step=run.samples_per_step
        )
        if sizes := self.data.announced():
            run.say(sizes)

    def ready(self) -> None:
        """Read this rank's share of the held-out images."""
        photographs = self.data.held_out()
        batch = self.config.validation.batch_size
        self.held_out = HeldOut(photographs, batch, self.run.rank, self.run.ranks)
        self.held_out_images = sum(gather_object([len(self.held_out)]))
        if not self.held_out_images:
            raise ValueError(f"data.validation: no readable images in {photographs.source}")

    # ---------------------------------------------------------------- one step

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Train on each image's latents at `qualities.an_image` qualities; the loss is in bits a latent value."""
        with record_function("autoencoder"):
            latents = self.latents(batch["images"])
        draws, qualities = Draws(self.config.seed, batch["sample"], self.run.device), self.config.qualities
        drawn = [draws.whole(qualities.lowest, qualities.highest) for _ in range(qualities.an_image)]
        quality = torch.tensor(drawn).flatten()
        with record_function("entropy model"):
            symbols = in_steps(latents.repeat(qualities.an_image, 1, 1, 1), quality)
            bits = self.player.network(symbols, quality.to(symbols)).sum() / symbols.numel()
            return self.move(bits)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents for the codec to round, (B, C, h, w), of about deviation 1."""
        images = images.to(self.run.device, self.vae.dtype, memory_format=torch.channels_last)
        return self.vae.scale(self.vae.encode(images).latent_dist.mode()).float()

    # ---------------------------------------------------------------- validation and export

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean bits per pixel of the held-out images of all ranks, at each of the qualities MEASURED."""
        totals = {quality: [0.0, 0] for quality in MEASURED}
        for images in self.held_out.batches():
            latents = self.latents(images)
            for quality, total in totals.items():
                of_each = torch.full((len(images),), quality)
                total[0] += self.exported(in_steps(latents, of_each), of_each.to(latents)).sum().item()
                total[1] += images[:, 0].numel()
        shares = gather_object([totals])
        return {
            f"bpp at {quality}": sum(share[quality][0] for share in shares)
            / sum(share[quality][1] for share in shares)
            for quality in MEASURED
        }

    def save_pictures(self, path: Path) -> bool:
        return False

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        return {"held_out": self.held_out_images}

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the model in whole numbers, a file for the autoencoder's folder, with a README.md about it."""

        def write(beside: Path) -> None:
            beside.mkdir()
            ContextModel(copy.deepcopy(self.exported)).save(beside / ENTROPY_MODEL)
            (beside / "README.md").write_text(card(self.config, facts), encoding="utf-8")

        write_folder(folder, write, facts["step"], facts["samples"])


def in_steps(latents: Tensor, quality: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> rounded numbers of steps, same shape; `quality` (B,) sets the step of each image."""
    steps = torch.tensor([step_of(value) for value in quality.tolist()], device=latents.device)
    return (latents / steps.view(-1, 1, 1, 1) + 0.5).floor()
