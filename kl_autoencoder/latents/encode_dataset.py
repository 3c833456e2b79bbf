"""Encode a source of photographs into shards of latents for diffusion training, bit for bit reproducibly.

The latents of a row depend on the row, the settings and its shard, never on the number of ranks, workers or
threads: crops and noise are functions of the seed and the row number, and `shard_encoder` keeps rounding the same.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from signal import SIG_IGN, SIGINT, signal
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.crops import TooSmall, buckets, read_part
from ..data.sources import encoded_file
from ..distributed import end_with_the_parent
from ..inference.workers import Workers
from ..models.autoencoder_kl import KLAutoencoder
from ..progress import Progress
from .shard_encoder import EncodeSettings, ShardEncoder, empty_statistics, little_endian, rng_for
from .shards import ShardFolder
from .statistics import Statistics

COMPARED = 16  # photographs whose bytes are hashed to recognise a source


def encode(
    vae: KLAutoencoder,
    photographs: datasets.Dataset,
    column: str,
    shards: ShardFolder,
    settings: EncodeSettings,
    rank: int = 0,
    ranks: int = 1,
    num_workers: int = 2,
    progress: bool = False,
) -> dict | None:
    """Encode the shards that no process has encoded or claimed; finish the data set if it is complete then.

    Returns the finished manifest, or None if other processes are still at work, the last of which finishes it.
    photographs: rows of `sources.open_source`, with images in `column`. num_workers: processes that read images.
    Raises ValueError for an empty source, a `size` that is not a multiple of f, and if no image could be encoded.
    """
    f = vae.downsampling
    if not len(photographs):
        raise ValueError("no photographs in the source")
    if settings.size % f:
        raise ValueError(f"size: {settings.size}; allowed: multiples of {f}")
    targets = buckets(settings.size, f) if settings.crop == "buckets" else [(settings.size, settings.size)]
    claimed = ((k, row) for k in shards.claims(rank, ranks) for row in shards.rows(k))
    loader = DataLoader(
        CroppedPhotographs(photographs, column, targets, settings, vae.config.in_channels),
        sampler=IteratorSampler(claimed),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=2 * settings.batch_size if num_workers else None,
        collate_fn=_uncollated,
        worker_init_fn=_start_worker,
    )
    schema = settings.features(photographs.features).arrow_schema
    done = sum(len(shards.rows(k)) for k in shards.complete())
    with (
        torch.inference_mode(),
        Workers(torch.get_num_threads() if vae.device.type == "cpu" else 1, vae.device) as workers,
        Progress("encoding", len(photographs), "images", initial=done, shown=progress) as bar,
    ):
        encoder = ShardEncoder(vae, settings, workers)
        for k, group in groupby(loader, key=lambda loaded: loaded["shard"]):
            rows, about = encoder.shard(_counted(group, bar))
            shards.write(k, pa.Table.from_pylist(rows, schema=schema), about)
            bar.up_to(sum(len(shards.rows(k)) for k in shards.complete()))  # includes shards of other ranks
    if len(shards.complete()) < shards.count:
        return None
    return finish(shards, empty_statistics(settings.content, vae))


def binding(vae: KLAutoencoder, photographs: datasets.Dataset, column: str, settings: EncodeSettings) -> dict:
    """The manifest entries in which all processes that write a data set must agree: model, source and settings."""
    return {
        "model": {"weights_sha256": weights_hash(vae)},
        "source": {"rows": len(photographs), "sampled_sha256": _sampled_hash(photographs, column)},
        "settings": asdict(settings),
    }


def weights_hash(vae: KLAutoencoder) -> str:
    """SHA-256 of all tensors with their names, types and shapes, in hexadecimal; the scaling is not included."""
    digest = hashlib.sha256(f"norm_num_groups {vae.config.norm_num_groups}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(little_endian(tensor))
    return digest.hexdigest()


class IteratorSampler:
    """A sampler over an iterator that can be iterated once; the loader draws from it as it reads ahead."""

    def __init__(self, iterator: Iterator):
        self.iterator = iterator

    def __iter__(self) -> Iterator:
        return self.iterator


class CroppedPhotographs(Dataset):
    """`dataset[shard, row]` -> a cropped photograph: {"shard", "row", "source_id", "part", "kept"}.

    "part" is the crop, as from `read_part`; "kept" has the columns of `settings.keep`. If the photograph is too
    small or unreadable, "reason" replaces both. targets: sizes (H, W) to crop to. channels: of the images.
    """

    def __init__(
        self,
        photographs: datasets.Dataset,
        column: str,
        targets: list,
        settings: EncodeSettings,
        channels: int = 3,
    ):
        self.photographs, self.column, self.targets, self.settings = photographs, column, targets, settings
        self.channels = channels

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        shard, row = place
        record = self.photographs[row]
        name = (record[self.column] or {}).get("path") or f"row {row}"
        loaded = {"shard": shard, "row": row, "source_id": name}
        rng = rng_for(self.settings.seed, row, "crop") if self.settings.crop == "random" else None
        try:
            part = read_part(encoded_file(record[self.column], name), self.targets, rng, self.channels)
        except TooSmall as error:
            return {**loaded, "reason": f"too small: {error}"}
        except Exception as error:  # decoders may raise almost any error for damaged bytes
            message = str(error).removeprefix(f"{name}: ") or type(error).__name__
            return {**loaded, "reason": f"unreadable: {message}"}
        return {**loaded, "part": part, "kept": {key: record[key] for key in self.settings.keep}}


def finish(shards: ShardFolder, total: Statistics) -> dict:
    """Write and return the manifest, with the statistics of all shards.

    They are merged in the order of the shards, so that the result does not depend on the process. total: empty
    statistics, see `empty_statistics`. Raises ValueError if no photograph could be encoded.
    """
    skipped, rows = [], 0
    for k in range(shards.count):
        about = shards.about(k)
        total.merge(type(total).from_state(about["statistics"]))
        skipped += about["skipped"]
        rows += about["rows"]
    if not rows:
        first = ": ".join(skipped[0][1:])
        raise ValueError(f"none of {shards.total} photographs could be encoded; the first: {first}")
    small = sum(reason.startswith("too small") for _, _, reason in skipped)
    result = {
        "rows": rows,
        "skipped": {"too small": small, "unreadable": len(skipped) - small},
        "statistics": total.summary(),
    }
    return shards.finish(result, skipped)


def _sampled_hash(photographs: datasets.Dataset, column: str) -> str:
    """SHA-256 over the bytes of `COMPARED` photographs, spread evenly over the source."""
    digest = hashlib.sha256()
    for row in np.unique(np.linspace(0, len(photographs) - 1, COMPARED).astype(int)):
        try:
            digest.update(encoded_file(photographs[int(row)][column], "").getbuffer())
        except (ValueError, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()


def _counted(loaded: Iterable[dict], bar: Progress) -> Iterator[dict]:
    for one in loaded:
        yield one
        bar.update()


def _uncollated(loaded: dict) -> dict:
    return loaded


def _start_worker(worker: int) -> None:
    end_with_the_parent()
    signal(SIGINT, SIG_IGN)  # the main process handles it
