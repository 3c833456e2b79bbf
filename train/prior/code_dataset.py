"""`CodeDataset`: codes that `encode-dataset --content codes` wrote; `StoredCodes`: those of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kl_autoencoder.latents.encode_dataset import weights_hash
from kl_autoencoder.latents.latent_dataset import LatentDataset, stored_latents
from kl_autoencoder.latents.shards import MANIFEST

from ..config.code_prior import CodePriorConfig, CodesConfig
from ..data.labels import Source, labels_of_rows
from ..data.rows import digest_of, split_by_name
from ..data.training_data import HELD_OUT
from .codes import Codes


def is_code_dataset(folder: str) -> bool:
    """Whether `folder` was written by `encode-dataset`."""
    return (Path(folder).expanduser() / MANIFEST).is_file()


class CodeDataset:
    """A data set of codes; `codes(numbers)` reads the codes, and with classes the labels, of these rows.

    key: the key of the configuration that names the folder, for errors. classes: how many there are, None without.
    names: of the images. Raises ValueError if the folder holds no codes, codes of another autoencoder or of several
    shapes, or no such column of labels.
    """

    def __init__(self, folder: str, key: str, autoencoder: Any, config: CodesConfig, classes: int | None):
        try:
            data = LatentDataset(folder, {"scaling_factor": 1.0})
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from error
        if data.content != "codes":
            raise ValueError(f"{key}: {folder} holds {data.content}; allowed: encode-dataset --content codes")
        if data.manifest["model"]["weights_sha256"] != weights_hash(autoencoder):
            raise ValueError(f"{key}: {folder} is of another autoencoder; allowed: model.autoencoder's codes")
        if len({tuple(shape) for shape in data.rows["shape"]}) != 1:
            raise ValueError(f"{key}: codes of several shapes in {folder}; allowed: one")
        if config.labels is not None:
            raise ValueError("data.labels: folders with a data set of codes; allowed: data.label_column")
        if config.label_column is not None and config.label_column not in data.kept:
            kept = ", ".join(data.kept) or "nothing"
            raise ValueError(
                f"data.label_column: {config.label_column} is no column of {folder}; allowed: what encode-dataset "
                f"--keep took along ({kept})"
            )
        self.rows, self.names = data.rows, list(data.rows["source_id"])
        self.labels = labels_of_rows(Source(folder, "", config.label_column, False), data.rows, classes)

    def codes(self, numbers: np.ndarray) -> Codes:
        """Read the codes of the rows `numbers`, in this order."""
        rows = [self.rows[int(number)] for number in numbers]
        grids = torch.stack([stored_latents(row, "codes")[0].long() for row in rows])
        if self.labels is None:
            return Codes(grids, None)
        return Codes(grids, torch.tensor([self.labels({"path": "", "columns": row}) for row in rows]))


class StoredCodes:
    """The codes of a run, read from data sets; `trained`, `held_out` and `found` are those of `EncodedImages`."""

    def __init__(self, config: CodePriorConfig, autoencoder: Any):
        data, classes = config.data, config.model.classes
        stored = others = CodeDataset(data.train, "data.train", autoencoder, data, classes)
        if data.validation is None:
            rows, held_out = split_by_name(
                stored.names, data.validation_images, HELD_OUT, "data.validation_images"
            )
        else:
            others = CodeDataset(data.validation, "data.validation", autoencoder, data, classes)
            rows = np.arange(len(stored.names))
            held_out = np.arange(len(others.names))[: data.validation_images or HELD_OUT]
        self.trained, self.held_out = stored.codes(rows), others.codes(held_out)
        names = digest_of(name.encode() for name in stored.names)
        self.found = {"images": len(stored.names), "sha256": names}
