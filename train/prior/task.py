"""The task `code_prior`: train a prior over the codes of a discrete autoencoder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.models.priors import CodePrior

from ..data.rows import RowBatches
from ..loop.context import RunContext
from ..one_network.exporting import write_folder
from ..one_network.task import OneNetwork, save_grid
from .code_dataset import StoredCodes, is_code_dataset
from .codes import EncodedImages


class CodePriorTask(OneNetwork):
    """Trains a transformer on the codes of images, in raster order.

    Creating it encodes all images, or reads their codes. Raises ValueError or FileNotFoundError, which names the
    key, if autoencoder or data cannot be used.
    """

    shown = ("loss",)

    def __init__(self, run: RunContext):
        config = run.config
        self.autoencoder = load_discrete(config.model.autoencoder, str(run.device))
        if is_code_dataset(config.data.train):
            self.codes = StoredCodes(config, self.autoencoder)
        else:
            self.codes = EncodedImages(config, self.autoencoder, run)
        trained = self.codes.trained
        rows = np.arange(len(trained.grids))
        self.data = RowBatches(trained.rows, rows, config.data.batch_size, config.seed, self.codes.found)
        height, width = self.codes.held_out.grids.shape[1:]
        torch.manual_seed(config.seed)
        prior = CodePrior(
            self.autoencoder.codes,
            height,
            width,
            config.model.classes,
            config.model.hidden_size,
            config.model.layers,
            config.model.heads,
            config.model.autoencoder,
        )
        super().__init__(run, prior)

    def micro_batch(self, step: int, batch: dict) -> dict[str, Tensor]:
        """Train on the cross-entropy of each code given those before it, in nats a code."""
        logits = self.player.network(batch["codes"], batch.get("labels"))
        return self.move(F.cross_entropy(logits.float().flatten(0, 2), batch["codes"].flatten()))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return `nll`, the mean -log p of held-out images' codes in nats a code, and `bits`, the same in bits."""
        prior, held_out = self.exported.eval(), self.codes.held_out
        batches = held_out.batches(self.config.validation.batch_size)[self.run.rank :: self.run.ranks]
        found = [
            prior.nll(
                *(batch[name].to(self.run.device) for name in ("codes", "labels") if name in batch)
            ).cpu()
            for batch in batches
        ]
        nll = self.mean_over_ranks(torch.cat([torch.zeros(0), *found])) / held_out.grids[0].numel()
        return {"nll": nll, "bits": nll / math.log(2)}

    @torch.no_grad()
    def save_pictures(self, path: Path) -> bool:
        """Write decoded draws from the prior, with the labels in turn if it has classes."""
        count, classes = self.config.validation.pictures, self.config.model.classes
        labels = None if classes is None else torch.arange(count) % classes
        generator = torch.Generator().manual_seed(self.config.seed)
        codes = self.exported.sample(count, labels, self.config.validation.temperature, generator)
        save_grid(path, decoded(self.autoencoder, codes))
        return True

    def export(self, folder: Path, facts: dict[str, Any]) -> None:
        write_folder(folder, self.exported.save_pretrained, facts["step"], facts["samples"])


def load_discrete(name: str, device: str) -> Any:
    """Load the discrete autoencoder `name`, in float32.

    Raises ValueError, which names model.autoencoder, if it cannot be loaded, is not discrete, or has classes.
    """
    try:
        model = load_model(name, device, "float32")
    except (ValueError, OSError) as error:
        raise ValueError(f"model.autoencoder: {name!r} cannot be loaded: {error}") from error
    if not getattr(model, "is_discrete", False):
        raise ValueError(
            f"model.autoencoder: {name!r} has no codes; allowed: one with a discrete bottleneck (vq, fsq, gumbel)"
        )
    if model.config.classes:
        raise ValueError(
            f"model.autoencoder: {name!r} is conditional; allowed: one without classes, whose prior has them"
        )
    return model


def decoded(autoencoder: Any, codes: Tensor) -> Tensor:
    """Decode codes (B, h, w), one image at a time -> images (B, C, H, W) in [-1, 1], float32, on the CPU."""
    return torch.cat([autoencoder.decode_indices(one).float().cpu() for one in codes.split(1)])
