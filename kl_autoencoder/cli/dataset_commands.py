"""What encode-dataset and set-scaling do, with arguments that checks.py has seen. ValueError or OSError."""

import argparse
import json
import os
import warnings
from pathlib import Path

import torch

from ..data.image_dataset import DATA
from ..data.sources import open_source
from ..distributed import rank_of
from ..files import replacing
from ..latents.encode_dataset import binding, encode, scaling_of, weights_hash
from ..latents.shard_encoder import EncodeSettings
from ..latents.shards import ShardFolder, read_manifest
from ..models import scaling
from ..models.folder import CONFIG, read_json
from .loading import load_model, move_model
from .paths import model_folder

NOTABLE_MEAN = 0.1  # of scaled latents, in deviations


def encode_dataset(arguments: argparse.Namespace) -> None:
    """A source of photographs -> a data set of latents, on any number of ranks; continues what is there."""
    rank, ranks, local_rank = rank_of(os.environ)
    names = ("size", "crop", "content", "stored_as", "dtype", "flip", "seed", "batch_size", "shard_rows")
    settings = EncodeSettings(**{key: getattr(arguments, key) for key in names}, keep=tuple(arguments.keep))
    column = arguments.image_column
    photographs = open_source(
        arguments.data, DATA, column, arguments.split, keep=settings.keep, in_order=True
    )
    vae = load_model(arguments.model, "cpu", None)
    bound = binding(vae, photographs, column, settings)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    move_model(vae, arguments.device or devices[local_rank % len(devices)], settings.dtype)
    made_from = {"model": arguments.model, "source": arguments.data, "scaling": scaling_of(vae)}
    with ShardFolder(Path(arguments.output), len(photographs), settings.shard_rows) as shards:
        shards.bind(bound, {"made_from": made_from})
        done = encode(
            vae, photographs, column, shards, settings, rank, ranks, arguments.workers, progress=rank == 0
        )
    if done:  # the last of the ranks
        _print(arguments.output, done)


def set_scaling(arguments: argparse.Namespace) -> None:
    """The statistics of a data set of latents -> the scaling in the config of the model that made it."""
    config = model_folder(Path(arguments.model)) / CONFIG
    manifest = read_manifest(arguments.latents)
    vae = load_model(str(config.parent), "cpu", None)
    if weights_hash(vae) != manifest["model"]["weights_sha256"]:
        raise ValueError(
            f"{arguments.latents}: was made by a model with other weights than {arguments.model}"
        )
    set_to = scaling.from_statistics(manifest["statistics"], arguments.pipeline, arguments.per_channel)
    content = read_json(config) | set_to
    with replacing(config) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    print(f"{config}: {scaling.described(set_to)}")
    _warn_of_scaling(arguments.pipeline, set_to, manifest["statistics"], vae.config.latent_channels)


def _warn_of_scaling(pipeline: str | None, set_to: dict, found: dict, channels: int) -> None:
    """Tell whose latents would be decoded wrongly."""
    reads = scaling.pipelines_of(set_to)
    if pipeline is None:
        others = [kind for kind in scaling.READ_BY if kind not in reads]
        warnings.warn(
            f"{' and '.join(reads)} pipelines read this, {' and '.join(others)} pipelines do not and would "
            "decode such latents wrongly; --for sets what one of them reads"
        )
        return
    published, mean = scaling.READ_BY[pipeline][1], found["shift_factor"] * found["scaling_factor"]
    if channels != published:
        warnings.warn(f"latents of {channels} channels; published {pipeline} models have {published}")
    if set_to["shift_factor"] is None and set_to["latents_mean"] is None and abs(mean) > NOTABLE_MEAN:
        warnings.warn(
            f"{pipeline} pipelines read no shift_factor: the scaled latents keep a mean of {mean:.2g} deviations"
        )


def _print(output: str, manifest: dict) -> None:
    skipped, found = manifest["skipped"], manifest["statistics"]
    photographs, rows = manifest["source"]["rows"], manifest["rows"]
    print(f"{output}: {photographs} photographs, {rows} rows of {manifest['settings']['content']}")
    listed = " (skipped.csv)" if any(skipped.values()) else ""
    print(f"{'skipped':16}{skipped['too small']} too small, {skipped['unreadable']} unreadable{listed}")
    for key, value in found.items():
        print(f"{key:16}{scaling.rounded(value)}")
