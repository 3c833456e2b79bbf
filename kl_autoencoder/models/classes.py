"""Find our class for a model: by the class name in its config.json, or by the tensors in a single file."""

import os
from pathlib import Path
from typing import Any

from ..files import clipped, read_header
from .autoencoder import Autoencoder
from .autoencoder_kl import ExactAutoencoder, KLAutoencoder
from .autoencoder_kl_flux2 import STATISTICS, KLAutoencoderFlux2
from .folder import CONFIG, read_json

Class = type[ExactAutoencoder] | type[Autoencoder]


def class_of(source: str | os.PathLike, subfolder: str = "", **options: Any) -> Class:
    """Return our class for a folder in diffusers' layout or a hub id, by the class name in its config.json.

    options: of diffusers' `load_config`. Raises ValueError for other models, OSError for a hub id without a model.
    """
    folder = Path(source, subfolder)
    if folder.is_dir():
        config = read_json(folder / CONFIG)
    else:
        config = hub_config(source, subfolder, **options)
    name = config.get("_class_name", "AutoencoderKL")
    if name not in CLASSES:
        raise ValueError(f"{source}: holds a {clipped(str(name), 60)}; allowed: {', '.join(CLASSES)}")
    return CLASSES[name]


def hub_config(source: str | os.PathLike, subfolder: str = "", **options: Any) -> dict[str, Any]:
    """Return the config.json of a hub id. Raises OSError if there is none."""
    return KLAutoencoder.load_config(source, subfolder=subfolder or None, **options)


def class_of_file(path: str | os.PathLike) -> type[ExactAutoencoder]:
    """Return our class for a single file; FLUX.2's autoencoder is recognised by its statistics."""
    is_flux2 = Path(path).suffix == ".safetensors" and f"{STATISTICS}running_mean" in read_header(Path(path))
    return KLAutoencoderFlux2 if is_flux2 else KLAutoencoder


# class name in a config.json -> our class
CLASSES: dict[str, Class] = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderKLFlux2": KLAutoencoderFlux2,
    "Autoencoder": Autoencoder,
}
