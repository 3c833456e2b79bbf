"""The task `latent_diffusion`: train a diffusion model on the latents of an autoencoder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.latent_diffusion import MOST_CLASSES, LatentsConfig
from ..data.training_data import HELD_OUT
from ..loop.context import RunContext
from ..one_network.exporting import write_folder
from ..one_network.task import OneNetwork, save_grid
from ..parts import Draws
from ..parts.draws import DIFFUSION, POSTERIOR_NOISE
from .card import card
from .latents import Latents
from .objective import PATHS, Noisy, spread_times, squared_error
from .pipeline import (
    NO_CLASS,
    build_pipeline,
    build_transformer,
    load_autoencoder,
    pictures,
    with_normalised_latents,
)

TIMES = 4  # number of times at which each held-out image is measured
VALIDATION = 0  # seed of the noise in validation: the same in every run, so that runs can be compared


class LatentDiffusionTask(OneNetwork):
    """Trains a DiT on normalised latents. `network` is the transformer; the autoencoder is not trained.

    Creating it raises ValueError, which names the key, if data set, autoencoder and network do not fit together.
    """

    shown = ("loss",)

    def __init__(self, run: RunContext):
        config, data = run.config, run.config.data
        self.latents = Latents(data.train, "data.train", data.label_column)
        if self.latents.classes is not None and len(self.latents.classes) > MOST_CLASSES:
            raise ValueError(
                f"data.label_column: {len(self.latents.classes)} classes; allowed: up to {MOST_CLASSES}"
            )
        rows, held_out = np.arange(len(self.latents)), None
        if data.validation is None:
            rows, held_out = self.latents.split(data.validation_images)
        self.data = self.latents.batches(rows, data.batch_size, config.seed)
        self.held_out, self.held_out_rows = self._held_out(data, held_out)
        vae = load_autoencoder(config.model.autoencoder, self.latents)
        self.vae = with_normalised_latents(vae, self.latents.mean, self.latents.std).to(run.device)
        self.path = PATHS[config.loss.prediction]()
        torch.manual_seed(config.seed)
        super().__init__(run, build_transformer(config.model, self.latents))

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Train on the mean squared error of the prediction, at a time that is drawn for each sample."""
        seed, samples, device = self.config.seed, batch["sample"], self.run.device
        z = self.latents.normalised(batch["stored"], Draws(seed, samples, device, POSTERIOR_NOISE))
        draws = Draws(seed, samples, device, DIFFUSION)
        noisy = self.path(z, draws.normal(*z.shape[1:]), draws.uniform(0, 1))
        labels = self._labels(batch)
        if self.latents.classes is not None:
            labels = torch.where(draws.uniform(0, 1) < self.config.loss.label_dropout, NO_CLASS, labels)
        return self.move(
            squared_error(self._predict(self.player.network, noisy, labels), noisy.target).mean()
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return `loss`, the mean squared error on held-out latents, always for the same times and noise."""
        size, found = self.config.validation.batch_size, [torch.zeros(0)]
        times = spread_times(len(self.held_out_rows), TIMES)
        for start in range(self.run.rank * size, len(self.held_out_rows), self.run.ranks * size):
            numbers = torch.arange(start, min(start + size, len(self.held_out_rows)))
            batch = self.held_out.read(self.held_out_rows[numbers.numpy()])
            batch = {name: tensor.to(self.run.device) for name, tensor in batch.items()}
            draws = Draws(VALIDATION, numbers, self.run.device, DIFFUSION)
            z = self.held_out.normalised(batch["stored"], draws)
            for u in times[numbers].to(self.run.device).T:
                noisy = self.path(z, draws.normal(*z.shape[1:]), u)
                predicted = self._predict(self.exported, noisy, self._labels(batch))
                found.append(squared_error(predicted, noisy.target).cpu())
        return {"loss": self.mean_over_ranks(torch.cat(found))}

    @torch.no_grad()
    def save_pictures(self, path: Path) -> bool:
        """Write pictures that the pipeline makes from noise, of the classes in turn."""
        validation = self.config.validation
        classes = 1 if self.latents.classes is None else len(self.latents.classes)
        labels = [i % classes for i in range(validation.pictures)]
        guidance = 1.0 if self.latents.classes is None else validation.guidance_scale
        images = pictures(self.pipeline(), labels, validation.inference_steps, guidance, self.config.seed)
        save_grid(path, images)
        return True

    def pipeline(self):
        """diffusers' DiTPipeline of the weights that would be exported."""
        return build_pipeline(self.exported, self.vae, self.path.scheduler, self.latents.classes)

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        def write(beside: Path) -> None:
            self.pipeline().save_pretrained(beside)
            (beside / "README.md").write_text(card(folder, self, facts), encoding="utf-8")

        write_folder(folder, write, facts["step"], facts["samples"])

    def _predict(self, network: Any, noisy: Noisy, labels: Tensor) -> Tensor:
        return network(noisy.latents, timestep=noisy.timestep, class_labels=labels).sample

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels of a batch, (B,) int64; 0 without classes."""
        if "labels" in batch:
            return batch["labels"]
        return torch.zeros(len(batch["stored"]), dtype=torch.int64, device=self.run.device)

    def _held_out(self, data: LatentsConfig, rows: np.ndarray | None) -> tuple[Latents, np.ndarray]:
        """Return the data set of the held-out latents, and their rows there.

        rows: held-out rows of data.train, None to take rows of data.validation. Raises ValueError if those latents
        are of another autoencoder.
        """
        if rows is not None:
            return self.latents, rows
        other = Latents(data.validation, "data.validation", data.label_column)
        if other.manifest["model"] != self.latents.manifest["model"]:
            raise ValueError(
                f"data.validation: {data.validation} is of another autoencoder; allowed: the same"
            )
        return other, np.arange(len(other))[: data.validation_images or HELD_OUT]
