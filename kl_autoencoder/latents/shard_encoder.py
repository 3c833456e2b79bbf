"""Encode the photographs of a shard into rows of a data set of latents.

On a CPU each image is encoded alone and by one thread, so that rounding depends neither on batches nor on the
number of threads. On a GPU batches are formed within a shard. Results are collected in the order of submission.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

from ..data.crops import CROPS, Part
from ..inference.workers import Workers
from ..models.autoencoder_kl import KLAutoencoder
from ..networks.distributions import DiagonalGaussian
from .statistics import CodeUsage, LatentStatistics, Statistics

CONTENTS = ("moments", "sample", "mode", "codes")
STORED = ("float16", "bfloat16", "float32", "int32")  # int32 is for codes
AHEAD = 2  # batches submitted per worker before the first result is waited for


@dataclass(frozen=True)
class EncodeSettings:
    """Everything that the latents depend on besides the model and the photographs; recorded in the manifest.

    `crop`: "centre", "random" or "buckets". `size`: crops are N x N pixels, with "buckets" about N^2 pixels.
    `content`: "moments" (mean and logvar, 2C channels), "sample" (one draw) or "mode" of the posterior, stored in
    the type `stored_as`; or "codes" of a discrete model, (1, h, w), stored as int32. `dtype`: in which the encoder
    computes. `flip`: also store the latents of the mirrored photograph, in a row of their own. `keep`: columns of
    the source to copy. `batch_size`: affects rounding on a GPU. `shard_rows`: rows of the source in a shard.

    Raises ValueError, which names the setting, for values that are not allowed.
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
        if (self.content == "codes") != (self.stored_as == "int32"):
            raise ValueError(
                f"stored_as: {self.stored_as} for {self.content}; allowed: int32 for codes, and for them alone"
            )
        for key in ("size", "batch_size", "shard_rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; allowed: at least 1")

    def features(self, source: datasets.Features) -> datasets.Features:
        """The columns of the data set. Raises ValueError if one of `keep` has the name of a column made here."""
        value, sequence = datasets.Value, datasets.Sequence
        own = {
            "row": value("int64"),  # row number in the source
            "source_id": value("string"),  # the image file's path, or else "row N"
            "original_size": sequence(value("int32"), length=2),  # height, width in pixels
            "crop_box": sequence(
                value("float32"), length=4
            ),  # left, top, right, bottom in pixels of the original
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


class ShardEncoder:
    """Encodes one shard after the other; the workers encode while further photographs are read.

    All torch operations run in the workers: torch would start further threads for those of another thread, and
    these would compete for the cores on which the workers encode.
    """

    def __init__(self, vae: KLAutoencoder, settings: EncodeSettings, workers: Workers):
        self.vae, self.settings, self.workers = vae, settings, workers
        self.batch_size = 1 if vae.device.type == "cpu" else settings.batch_size

    def shard(self, photographs: Iterable[dict]) -> tuple[list[dict], dict]:
        """Encode the photographs of a shard: its rows in order, and {"skipped", "rows", "statistics"} about it.

        photographs: entries of `CroppedPhotographs`.
        """
        total, rows, skipped = empty_statistics(self.settings.content, self.vae), [], []
        for some, statistics in self.encoded(self.batches(photographs, skipped)):
            rows += some
            total.merge(statistics)
        rows.sort(key=lambda row: (row["row"], row["flipped"]))
        return rows, {"skipped": skipped, "rows": len(rows), "statistics": total.state()}

    def batches(self, photographs: Iterable[dict], skipped: list[tuple]) -> Iterator[list[dict]]:
        """Yield batches of photographs of one size; append (row, source_id, reason) of others to `skipped`."""
        waiting = {}
        for loaded in photographs:
            if "reason" in loaded:
                skipped.append((loaded["row"], loaded["source_id"], loaded["reason"]))
                continue
            shape = loaded["part"].pixels.shape
            waiting.setdefault(shape, []).append(loaded)
            if len(waiting[shape]) == self.batch_size:
                yield waiting.pop(shape)
        for shape in sorted(waiting):
            yield waiting[shape]

    def encoded(self, batches: Iterable[list[dict]]) -> Iterator[tuple[list[dict], Statistics]]:
        """Encode batches in the workers, yield `rows` of each in order; with `flip` also of its mirror images."""
        begun = deque()
        for batch in batches:
            for flipped in (False, True) if self.settings.flip else (False,):
                begun.append(self.workers.submit(self.rows, batch, flipped))
                if len(begun) > AHEAD * self.workers.count:
                    yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def rows(self, batch: list[dict], flipped: bool) -> tuple[list[dict], Statistics]:
        """Encode a batch: its rows, and the statistics of their latents."""
        images = torch.stack([loaded["part"].images for loaded in batch])
        if flipped:
            images = images.flip(-1)
        if self.vae.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.vae.device, self.vae.dtype, non_blocking=True)
        numbers = [loaded["row"] for loaded in batch]
        stored = self.kept(images, numbers, flipped).to(getattr(torch, self.settings.stored_as))
        rows = [self.row(loaded, z, flipped) for loaded, z in zip(batch, stored, strict=True)]
        return rows, self.statistics(stored)

    def kept(self, images: Tensor, rows: list[int], flipped: bool) -> Tensor:
        """Encode images (B, C, H, W) to what is stored of each, on the CPU.

        moments: (B, 2C, h, w); sample and mode: (B, C, h, w), with C latent channels; codes: (B, 1, h, w).
        rows: numbers of the images in the source, which seed the noise of "sample".
        """
        if self.settings.content == "codes":
            return self.vae.encode_indices(images)[:, None].cpu()
        posterior = DiagonalGaussian(self.vae.encode(images).latent_dist.parameters.cpu())
        if self.settings.content == "mode":
            return posterior.mode()
        if self.settings.content == "moments":
            return torch.cat([posterior.mean, posterior.logvar], dim=1)
        keys = [rng_for(self.settings.seed, row, f"noise {flipped}") for row in rows]
        return posterior.sample([torch.Generator().manual_seed(int(rng.random() * 2**53)) for rng in keys])

    def statistics(self, stored: Tensor) -> Statistics:
        """Statistics of the values as stored; for moments, those of samples drawn from them."""
        statistics = empty_statistics(self.settings.content, self.vae)
        if self.settings.content == "moments":
            posterior = DiagonalGaussian(stored.double())
            statistics.update(posterior.mean, posterior.var)
        else:
            statistics.update(stored)
        return statistics

    def row(self, loaded: dict, z: Tensor, flipped: bool) -> dict:
        """The row of one image, with the columns of `EncodeSettings.features`. ValueError if z is not finite."""
        if not z.isfinite().all():
            raise ValueError(
                f"{loaded['source_id']}: its latents are not finite in {self.settings.dtype} stored as "
                f"{self.settings.stored_as}; try float32"
            )
        part: Part = loaded["part"]
        return {
            "row": loaded["row"],
            "source_id": loaded["source_id"],
            "original_size": part.size,
            "crop_box": part.box,
            "flipped": flipped,
            "shape": list(z.shape),
            "dtype": self.settings.stored_as,
            self.settings.content: little_endian(z),
            **loaded["kept"],
        }


def empty_statistics(content: str, vae: KLAutoencoder) -> Statistics:
    """Statistics without any images: `CodeUsage` for codes, `LatentStatistics` for other contents."""
    return CodeUsage(vae.codes) if content == "codes" else LatentStatistics(vae.config.latent_channels)


def rng_for(seed: int, row: int, purpose: str) -> random.Random:
    """A random generator for one row of the source and one purpose."""
    return random.Random(f"{seed}/{row}/{purpose}")  # strings seed the same in all versions of Python


def little_endian(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order, as the machine stores them; supported ones are little-endian."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
