"""Shrink the recipe of an entropy model: sources, crops, batch, network, qualities an image."""

from dataclasses import replace

from kl_autoencoder.models.packaged import COMPACT

from ..config import EntropyModelConfig
from .autoencoder import is_here, small_data, without_missing_start


def shrink(config: EntropyModelConfig) -> EntropyModelConfig:
    """Return the same recipe with the sections of this task made small."""
    model, qualities = config.model, config.qualities
    if not is_here(model.pretrained):
        model = replace(model, pretrained=COMPACT.name, subfolder=None, start=None)
    model = without_missing_start(model)
    return replace(
        config,
        data=small_data(config.data),
        model=replace(model, width=min(model.width, 8)),
        qualities=replace(qualities, an_image=min(qualities.an_image, 2)),
    )


def replaced(before: EntropyModelConfig, after: EntropyModelConfig) -> list[str]:
    """Return a line for the source and the model that were replaced because they are not on this machine."""
    pairs = [
        ("data.train", before.data.train, after.data.train),
        ("model.pretrained", before.model.pretrained, after.model.pretrained),
        ("model.start", before.model.start, after.model.start),
    ]
    return [f"{key}: {old} is not on this machine; {new} instead" for key, old, new in pairs if old != new]
