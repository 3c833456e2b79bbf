"""A source of photographs -> shards of latents for diffusion training, the same whatever happens on the way.

What becomes of a row depends on the row, the settings and the shard that it is in, never on the number of ranks,
workers or threads: crops and noise are functions of the seed and the row, batches are filled within a shard, and
on a CPU each image is encoded by one thread, on its own.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from signal import SIG_IGN, SIGINT, signal
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .autoencoder import KLAutoencoder
from .crops import CROPS, Part, TooSmall, buckets, read_part
from .latents import SCALING_KEYS, LatentStatistics
from .posterior import DiagonalGaussian
from .shards import ShardFolder
from .sources import encoded_file
from .workers import Workers

CONTENTS = ("moments", "sample", "mode")
STORED = ("float16", "bfloat16", "float32")
COMPARED = 16  # photographs whose bytes say whether a source is the same


@dataclass(frozen=True)
class EncodeSettings:
    """What makes the latents what they are, apart from the model and the photographs; all of it is in the manifest.

    `size`: of the crops, N x N pixels, or their mean side with `crop` "buckets" (else "centre" or "random").
    `content`: "moments" (mean and logvar, 2C channels), "sample" (one draw) or "mode" of the posterior, kept as
    `stored_as`. `dtype`: the type that the encoder computes in. `flip`: the mirrored photograph's latents too, as
    a row of their own. `keep`: columns of the source to take along. `batch_size` matters for rounding on a GPU.
    """

    size: int
    crop: str = "centre"
    content: str = "moments"
    stored_as: str = "float16"
    dtype: str = "float32"
    flip: bool = False
    keep: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 16
    shard_rows: int = 512

    def __post_init__(self):
        for key, allowed in (("crop", CROPS), ("content", CONTENTS), ("stored_as", STORED)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        for key in ("size", "batch_size", "shard_rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; allowed: at least 1")

    def features(self, source: datasets.Features) -> datasets.Features:
        """The columns of the result."""
        value, sequence = datasets.Value, datasets.Sequence
        own = {
            "row": value("int64"),  # its number in the source
            "source_id": value("string"),  # the file's path where there is one
            "original_size": sequence(value("int32"), length=2),  # height, width in pixels
            "crop_box": sequence(value("float32"), length=4),  # left, top, right, bottom, in those pixels
            "flipped": value("bool"),
            "shape": sequence(value("int32"), length=3),
            "dtype": value("string"),
            self.content: value("binary"),  # little-endian
        }
        for name in self.keep:
            if name in own:
                raise ValueError(f"keep: {name!r} is a column of the result; rename the source's")
            own[name] = source[name]
        return datasets.Features(own)


def encode_dataset(
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
    """Encode what nobody has encoded yet, and if it is complete then, write the manifest's results and return it.

    `photographs`: of `sources.open_source`. None if other processes are still at work; the last one finishes.
    """
    f = vae.downsampling
    if not len(photographs):
        raise ValueError("no photographs in the source")
    if settings.size % f:
        raise ValueError(f"size: {settings.size}; allowed: multiples of {f}")
    targets = buckets(settings.size, f) if settings.crop == "buckets" else [(settings.size, settings.size)]
    claimed = ((k, row) for k in shards.claims(rank, ranks) for row in shards.rows(k))
    loader = DataLoader(
        Photographs(photographs, column, targets, settings),
        sampler=Once(claimed),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=2 * settings.batch_size if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts,
    )
    schema = settings.features(photographs.features).arrow_schema
    done = sum(len(shards.rows(k)) for k in shards.complete())
    with (
        torch.inference_mode(),
        Workers(torch.get_num_threads() if vae.device.type == "cpu" else 1, vae.device) as workers,
        tqdm(total=len(photographs), initial=done, unit=" images", disable=None if progress else True) as bar,
    ):
        encoder = BatchEncoder(vae, settings, workers)
        for k, group in groupby(loader, key=lambda loaded: loaded["shard"]):
            rows, about = encode_shard(_counted(group, bar), encoder)
            shards.write(k, pa.Table.from_pylist(rows, schema=schema), about)
            bar.n = max(bar.n, sum(len(shards.rows(k)) for k in shards.complete()))  # the other ranks' too
    if len(shards.complete()) < shards.count:
        return None
    return finish(shards, vae.config.latent_channels)


def binding(vae: KLAutoencoder, photographs: datasets.Dataset, column: str, settings: EncodeSettings) -> dict:
    """What rows of one data set must have in common: the model's weights, the photographs and the settings."""
    return {
        "model": {"weights_sha256": weights_hash(vae)},
        "source": {"rows": len(photographs), "sampled_sha256": _sampled_hash(photographs, column)},
        "settings": asdict(settings),
    }


def weights_hash(vae: KLAutoencoder) -> str:
    """SHA-256 of all tensors, with their names, types and shapes. Scaling is no part of it."""
    digest = hashlib.sha256(f"norm_num_groups {vae.config.norm_num_groups}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


class Once:
    """What an iterator yields, as a sampler: drawn as the loader reads ahead, over the borders of shards."""

    def __init__(self, iterator: Iterator):
        self.iterator = iterator

    def __iter__(self) -> Iterator:
        return self.iterator


class Photographs(Dataset):
    """(shard, row) -> {"shard", "row", "source_id", "part", "kept"}, or {..., "reason"} why there is none."""

    def __init__(self, photographs: datasets.Dataset, column: str, targets: list, settings: EncodeSettings):
        self.photographs, self.column, self.targets, self.settings = photographs, column, targets, settings

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        shard, row = place
        record = self.photographs[row]
        name = (record[self.column] or {}).get("path") or f"row {row}"
        loaded = {"shard": shard, "row": row, "source_id": name}
        rng = random_of(self.settings.seed, row, "crop") if self.settings.crop == "random" else None
        try:
            part = read_part(encoded_file(record[self.column], name), self.targets, rng)
        except TooSmall as error:
            return {**loaded, "reason": f"too small: {error}"}
        except Exception as error:  # decoders fed with damaged bytes raise nearly everything
            message = str(error).removeprefix(f"{name}: ") or type(error).__name__
            return {**loaded, "reason": f"unreadable: {message}"}
        return {**loaded, "part": part, "kept": {key: record[key] for key in self.settings.keep}}


class BatchEncoder:
    """Batches of photographs of one size -> rows of the data set, and statistics of the latents in them."""

    def __init__(self, vae: KLAutoencoder, settings: EncodeSettings, workers: Workers):
        self.vae, self.settings, self.workers = vae, settings, workers
        self.statistics = self.fresh_statistics()

    def fresh_statistics(self) -> LatentStatistics:
        return LatentStatistics(self.vae.config.latent_channels)

    def rows(self, batch: list[dict], flipped: bool) -> list[dict]:
        images = torch.stack([loaded["part"].images for loaded in batch])
        moments = self.moments(images.flip(-1) if flipped else images).cpu()
        kept = self.kept(DiagonalGaussian(moments), [loaded["row"] for loaded in batch], flipped)
        stored = kept.to(getattr(torch, self.settings.stored_as))
        for loaded, finite in zip(batch, stored.isfinite().flatten(1).all(1), strict=True):
            if not finite:
                raise ValueError(
                    f"{loaded['source_id']}: its latents are not finite in {self.settings.dtype} stored as "
                    f"{self.settings.stored_as}; try float32"
                )
        self.count(stored)
        return [self.row(loaded, z, flipped) for loaded, z in zip(batch, stored, strict=True)]

    def moments(self, images: Tensor) -> Tensor:
        """On a CPU an image a thread, so that neither batches nor threads change how a result is rounded."""
        vae = self.vae
        if vae.device.type != "cpu":
            images = images.pin_memory() if vae.device.type == "cuda" else images
            images = images.to(vae.device, vae.dtype, non_blocking=True)
            return vae.encode(images).latent_dist.parameters
        results: list[Tensor | None] = [None] * len(images)

        def one(i: int) -> None:
            results[i] = vae.encode(images[i : i + 1].to(vae.dtype)).latent_dist.parameters

        self.workers.run(one, range(len(images)))
        return torch.cat(results)

    def kept(self, posterior: DiagonalGaussian, rows: list[int], flipped: bool) -> Tensor:
        if self.settings.content == "mode":
            return posterior.mode()
        if self.settings.content == "moments":
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        keys = [random_of(self.settings.seed, row, f"noise {flipped}") for row in rows]
        return posterior.sample([torch.Generator().manual_seed(int(rng.random() * 2**53)) for rng in keys])

    def count(self, stored: Tensor) -> None:
        """Statistics of the values as they are stored; of moments, of what is sampled from them."""
        if self.settings.content == "moments":
            posterior = DiagonalGaussian(stored.double())
            self.statistics.update(posterior.mean, posterior.var)
        else:
            self.statistics.update(stored)

    def row(self, loaded: dict, z: Tensor, flipped: bool) -> dict:
        part: Part = loaded["part"]
        return {
            "row": loaded["row"],
            "source_id": loaded["source_id"],
            "original_size": part.size,
            "crop_box": part.box,
            "flipped": flipped,
            "shape": list(z.shape),
            "dtype": self.settings.stored_as,
            self.settings.content: _bytes(z),
            **loaded["kept"],
        }


def encode_shard(photographs: Iterable[dict], encoder: BatchEncoder) -> tuple[list[dict], dict]:
    """The rows of a shard in order, and what is told about it: statistics and what was skipped."""
    encoder.statistics = encoder.fresh_statistics()
    rows, skipped, waiting = [], [], {}

    def encode(batch: list[dict]) -> None:
        for flipped in (False, True) if encoder.settings.flip else (False,):
            rows.extend(encoder.rows(batch, flipped))

    for loaded in photographs:
        if "reason" in loaded:
            skipped.append((loaded["row"], loaded["source_id"], loaded["reason"]))
            continue
        shape = loaded["part"].pixels.shape
        waiting.setdefault(shape, []).append(loaded)
        if len(waiting[shape]) == encoder.settings.batch_size:
            encode(waiting.pop(shape))
    for shape in sorted(waiting):
        encode(waiting[shape])
    rows.sort(key=lambda row: (row["row"], row["flipped"]))
    return rows, {"skipped": skipped, "rows": len(rows), "statistics": encoder.statistics.state()}


def finish(shards: ShardFolder, channels: int) -> dict:
    """Put together what the shards tell, in their order, so that every process comes to the same."""
    total, skipped, rows = LatentStatistics(channels), [], 0
    for k in range(shards.count):
        about = shards.about(k)
        total.merge(LatentStatistics.from_state(about["statistics"]))
        skipped += about["skipped"]
        rows += about["rows"]
    if not rows:
        first = ": ".join(skipped[0][1:])
        raise ValueError(f"none of {shards.total} photographs could be encoded; the first: {first}")
    small = sum(reason.startswith("too small") for _, _, reason in skipped)
    result = {
        "rows": rows,
        "skipped": {"too small": small, "unreadable": len(skipped) - small},
        "statistics": {
            "scaling_factor": total.scaling_factor,
            "shift_factor": total.shift_factor,
            "mean": total.mean.tolist(),
            "std": total.std.tolist(),
        },
    }
    return shards.finish(result, skipped)


def scaling_of(vae: KLAutoencoder) -> dict:
    return {key: vae.config.get(key) for key in SCALING_KEYS}


def random_of(seed: int, row: int, purpose: str) -> random.Random:
    return random.Random(f"{seed}/{row}/{purpose}")  # Python promises that text seeds alike in all versions


def _sampled_hash(photographs: datasets.Dataset, column: str) -> str:
    digest = hashlib.sha256()
    for row in np.unique(np.linspace(0, len(photographs) - 1, COMPARED).astype(int)):
        try:
            digest.update(encoded_file(photographs[int(row)][column], "").getbuffer())
        except (ValueError, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _counted(loaded: Iterable[dict], bar: tqdm) -> Iterator[dict]:
    for one in loaded:
        yield one
        bar.update()


def _as_it_is(loaded: dict) -> dict:
    return loaded


def _leave_interrupts(worker: int) -> None:
    signal(SIGINT, SIG_IGN)  # the main process's to handle
