"""Photographs of a shard -> rows of a data set of latents.

On a CPU each image is encoded by one thread, on its own, so that neither batches nor threads change how a result is
rounded; on a GPU batches are filled within a shard. Results are taken in the order in which they were begun.
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
STORED = ("float16", "bfloat16", "float32", "int32")  # the last for codes
AHEAD = 2  # batches begun for each worker before the first is waited for


@dataclass(frozen=True)
class EncodeSettings:
    """What makes the latents what they are, apart from the model and the photographs; all of it is in the manifest.

    `size`: of the crops, N x N pixels, or their mean side with `crop` "buckets" (else "centre" or "random").
    `content`: "moments" (mean and logvar, 2C channels), "sample" (one draw) or "mode" of the posterior, kept as
    `stored_as`; or "codes" of a discrete model, (1, h, w), kept as int32. `dtype`: the type the encoder computes
    in. `flip`: the mirrored photograph's latents too, as a row of their own. `keep`: columns of the source to take
    along. `batch_size` matters for rounding on a GPU.
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


class ShardEncoder:
    """The rows of one shard after another; the workers encode while more photographs are read.

    All that torch has to do is done by them: its own threads, started from another, would wait for one another on
    the cores that encode.
    """

    def __init__(self, vae: KLAutoencoder, settings: EncodeSettings, workers: Workers):
        self.vae, self.settings, self.workers = vae, settings, workers
        self.batch_size = 1 if vae.device.type == "cpu" else settings.batch_size

    def shard(self, photographs: Iterable[dict]) -> tuple[list[dict], dict]:
        """The rows of a shard in order, and what is told about it: statistics and what was skipped."""
        total, rows, skipped = empty_statistics(self.settings.content, self.vae), [], []
        for some, statistics in self.encoded(self.batches(photographs, skipped)):
            rows += some
            total.merge(statistics)
        rows.sort(key=lambda row: (row["row"], row["flipped"]))
        return rows, {"skipped": skipped, "rows": len(rows), "statistics": total.state()}

    def batches(self, photographs: Iterable[dict], skipped: list[tuple]) -> Iterator[list[dict]]:
        """Photographs of one size each, and onto `skipped` those that there are none of."""
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
        begun = deque()
        for batch in batches:
            for flipped in (False, True) if self.settings.flip else (False,):
                begun.append(self.workers.submit(self.rows, batch, flipped))
                if len(begun) > AHEAD * self.workers.count:
                    yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def rows(self, batch: list[dict], flipped: bool) -> tuple[list[dict], Statistics]:
        """The rows of a batch, and the statistics of the latents in them."""
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
        """What is kept of each image, (B, ...), on the CPU."""
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
        """Of the values as they are stored; of moments, of what is sampled from them."""
        statistics = empty_statistics(self.settings.content, self.vae)
        if self.settings.content == "moments":
            posterior = DiagonalGaussian(stored.double())
            statistics.update(posterior.mean, posterior.var)
        else:
            statistics.update(stored)
        return statistics

    def row(self, loaded: dict, z: Tensor, flipped: bool) -> dict:
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
    """Statistics of no images yet: of latents, or how often each code is used."""
    return CodeUsage(vae.codes) if content == "codes" else LatentStatistics(vae.config.latent_channels)


def rng_for(seed: int, row: int, purpose: str) -> random.Random:
    return random.Random(f"{seed}/{row}/{purpose}")  # Python promises that text seeds alike in all versions


def little_endian(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
