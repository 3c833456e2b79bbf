"""What encode-dataset and set-scaling do, with arguments that checks.py has seen. ValueError or OSError."""

import argparse
import json
import os
from pathlib import Path

import torch

from ..data.image_dataset import DATA
from ..data.sources import open_source
from ..distributed import rank_of
from ..files import replacing
from ..latents.encode_dataset import binding, encode, scaling_of, weights_hash
from ..latents.shard_encoder import EncodeSettings
from ..latents.shards import ShardFolder, read_manifest
from ..models.scaling import SCALING_KEYS
from .loading import load_model, move_model
from .paths import model_folder


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
    config = model_folder(Path(arguments.model)) / "config.json"
    manifest = read_manifest(arguments.latents)
    if weights_hash(load_model(arguments.model, "cpu", None)) != manifest["model"]["weights_sha256"]:
        raise ValueError(
            f"{arguments.latents}: was made by a model with other weights than {arguments.model}"
        )
    found, scaling = manifest["statistics"], dict.fromkeys(SCALING_KEYS)
    if arguments.per_channel:
        scaling |= {"scaling_factor": 1.0, "latents_mean": found["mean"], "latents_std": found["std"]}
    else:
        scaling |= {key: found[key] for key in ("scaling_factor", "shift_factor")}
    content = json.loads(config.read_text()) | scaling
    with replacing(config) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    set_to = [f"{key} {_short(value)}" for key, value in scaling.items() if value is not None]
    print(f"{config}: {', '.join(set_to)}")


def _print(output: str, manifest: dict) -> None:
    skipped, found = manifest["skipped"], manifest["statistics"]
    photographs, rows = manifest["source"]["rows"], manifest["rows"]
    print(f"{output}: {photographs} photographs, {rows} rows of {manifest['settings']['content']}")
    listed = " (skipped.csv)" if any(skipped.values()) else ""
    print(f"{'skipped':16}{skipped['too small']} too small, {skipped['unreadable']} unreadable{listed}")
    for key, value in found.items():
        print(f"{key:16}{_short(value)}")


def _short(value: float | list[float]) -> str:
    return " ".join(_short(one) for one in value) if isinstance(value, list) else f"{value:.5g}"
