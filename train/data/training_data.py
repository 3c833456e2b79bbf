"""`TrainingData`: from sources to batches (B, C, H, W) in [-1, 1], resumable at any sample, and held-out images.

Sample number n, counted from 0 over the whole run and all ranks, is a pure function of the source, the seed and n:
which image, which crop, flipped or not. A checkpoint therefore only holds how many samples were consumed, and a run
continues at the next one on any number of ranks and workers. For streams this holds with the limits that
`StreamedImages` names.
"""

import hashlib
import logging
import os
import random
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kl_autoencoder.data.crops import buckets
from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.locating import locate
from kl_autoencoder.data.sources import Keys, Rows, image_keys, open_source, open_stream

from .config import DataConfig
from .labels import Source, labels_of_rows, labels_of_stream
from .loader import TrainLoader, start_worker
from .random_access import BucketOrder, SampleOrder, TrainImages
from .samples import binarised, check_images, collate, permutation
from .sizes import Buckets, Sizes, Steps, announced, read_sizes, sort_into_buckets
from .streams import Reader, StreamedImages, readers_of_a_file

HELD_OUT = 64  # held-out images where data.validation_images is null
LOOKED_AT = 32  # images whose headers are read before any work starts
TRAIN, VALIDATION = (
    Keys(f"data.{source}", "data.image_column", "data.label_column") for source in ("train", "validation")
)
DRAWN = 0  # key of the permutation by which validation images are chosen from a larger source

log = logging.getLogger(__name__)


def split_rows(config: DataConfig, images: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training source to train on, and those held out: the same for every seed and run.

    Held out are the images with the smallest hashes of their names (of their contents, where they have no names).
    An image that is added to the source thus replaces at most one held-out image, and no image that was trained on
    becomes a held-out one, unless a held-out one is removed from the source.
    """
    if config.validation is not None:
        return np.arange(len(images)), np.arange(0)
    held_out = config.validation_images or max(1, min(HELD_OUT, len(images) // 8))
    if held_out >= len(images):
        raise ValueError(
            f"data.validation_images: {held_out}, to be held out of the {len(images)} images of "
            f"{config.train}; allowed: fewer, or a source of their own as data.validation"
        )
    keys = image_keys(images, config.image_column, config.train)
    hashes = [hashlib.sha256(b"held out " + key).digest() for key in keys]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class TrainingData:
    """The sources of a run, opened once: batches to train on, held-out images, a fingerprint.

    classes: how many the network knows, None for any number. multiple: of which the sides of crops have to be.
    samples_per_step: over all ranks, None for a micro-batch; samples of a step have one size. Raises ValueError or
    FileNotFoundError for a training source that cannot be used, and ValueError for classes out of range.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        classes: int | None = None,
        multiple: int = 1,
        samples_per_step: int | None = None,
    ):
        self.config, self.seed, self.multiple = config, seed, multiple
        self.samples_per_step = samples_per_step or config.batch_size
        self.buckets: Buckets | None = None
        self.lengths: dict[str, int] = {}  # of the shards of a stream that were read to the end
        self.kept = [] if config.label_column is None else [config.label_column]
        source = Source(config.train, config.image_column, config.label_column, config.labels == "folders")
        if config.streaming:
            self.stream = open_stream(config.train, TRAIN, config.image_column, config.split, self.kept)
            self.labels = labels_of_stream(source, self.stream, classes)
        else:
            self.images = open_source(config.train, TRAIN, config.image_column, config.split, keep=self.kept)
            self.rows, self.held_out_rows = split_rows(config, self.images)
            self.labels = labels_of_rows(source, self.images, classes)
        largest = max(config.resolutions)
        targets = buckets(largest, multiple) if config.buckets else [(largest, largest)]
        records = self._dataset().some_records(LOOKED_AT)
        check_images(config.train, config.too_small == "enlarge", largest, targets, records)
        if config.buckets:
            self.buckets = self._sorted()

    def _sorted(self) -> Buckets:
        """The buckets that the training images are in."""
        sizes = read_sizes(self._dataset())
        return sort_into_buckets(sizes, self.config.resolutions[0], self.multiple, self.samples_per_step)

    @property
    def number_of_sizes(self) -> int:
        """How many sizes crops have."""
        return len(set(self.config.resolutions)) * (1 if self.buckets is None else len(self.buckets.sizes))

    def announced(self) -> str:
        """A line that says which sizes crops have; "" where all are squares of one."""
        return announced(self.config.resolutions, self.buckets, self.samples_per_step)

    def loader(
        self, start_sample: int = 0, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> TrainLoader:
        """The micro-batches of rank `rank` of `world_size`, from sample `start_sample` of the run on, without end.

        A batch is {"images": (B, C, H, W) float32 in [-1, 1], "sample": (B,) int64, numbers of its samples,
        "skipped": [(name, reason), ...], the images met that could not be used, for `SkippedImages`}, and where
        they have classes "labels": (B,) int64. The numbers
        of different ranks interleave, see `SampleOrder`. Workers read ahead, so the `start_sample` of a
        continued run is the number of samples that the trainer has consumed, over all ranks.

        Do not pass it to accelerate's `prepare`, which would divide the batches among the ranks a second time.
        """
        config, dataset = self.config, self._dataset(start_sample, rank, world_size)
        parts = max(config.num_workers, 1) if config.streaming else 1
        if config.streaming:
            order = {"batch_size": None}  # the data set yields parts of batches itself
            order |= {"prefetch_factor": 2 * parts} if config.num_workers else {}
            self._warn_of_shared_files(rank, world_size, parts)
        else:
            order = {"batch_sampler": self._order(start_sample, rank, world_size)}
        loader = DataLoader(
            dataset,
            **order,
            num_workers=config.num_workers,
            collate_fn=_unchanged if config.streaming else collate,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # without it each new iterator would advance torch's global generator
        )
        return TrainLoader(loader, device, parts, self.lengths)

    def _order(self, start_sample: int, rank: int, world_size: int) -> SampleOrder | BucketOrder:
        batch_size = self.config.batch_size
        if self.buckets is None:
            return SampleOrder(len(self.rows), self.seed, batch_size, start_sample, rank, world_size)
        steps = Steps(self.samples_per_step, start_sample)
        return BucketOrder(self.buckets, self.seed, batch_size, steps, rank, world_size)

    def _sizes(self, start_sample: int) -> Sizes:
        steps = Steps(self.samples_per_step, start_sample)
        targets = None if self.buckets is None else self.buckets.sizes
        return Sizes(self.config.resolutions, self.seed, steps, targets, self.multiple)

    def _warn_of_shared_files(self, rank: int, ranks: int, workers: int) -> None:
        times = readers_of_a_file(self.stream.num_shards, ranks, workers)
        if rank == 0 and times > 1:
            log.warning(
                "data.num_workers: %d workers of each of %d ranks read %d files, each %.3g times; more files or "
                "fewer workers read less", workers, ranks, self.stream.num_shards, times,
            )  # fmt: skip

    def _dataset(
        self, start_sample: int = 0, rank: int = 0, world_size: int = 1
    ) -> TrainImages | StreamedImages:
        config, sizes = self.config, self._sizes(start_sample)
        if not config.streaming:
            return TrainImages(config, self.seed, self.images, self.rows, self.labels, sizes, self.buckets)
        return StreamedImages(
            self.stream, config.crops, sizes, self.seed, config.batch_size, config.shuffle_buffer, start_sample,
            self.lengths, Reader(rank, world_size, workers=max(config.num_workers, 1)), self.labels,
        )  # fmt: skip

    def held_out(self) -> Photographs:
        """At most `validation_images` images, squares of the validation resolution; the same for every seed.

        They come from `data.validation`, drawn at random where it has more (of a stream, the first), or are held
        out of the training source. Raises the same errors as the constructor.
        """
        config = self.config
        column, wanted = config.image_column, config.validation_images or HELD_OUT
        size = config.held_out_side
        read = {"smallest": 1, "channels": config.channels, "label": self.labels}
        if config.binarize:
            read["transform"] = partial(binarised_once, kind=config.binarize)
        if config.validation is None:
            return Photographs(self.images, config.train, size, column, self.held_out_rows, **read)
        if config.streaming and (head := self._head(wanted)) is not None:
            return Photographs(head, config.validation, size, column, **read)
        split = config.validation_split
        images = open_source(config.validation, VALIDATION, column, split, "validation", self.kept)
        rows = np.sort(permutation(len(images), DRAWN)[:wanted])
        return Photographs(images, config.validation, size, column, rows, **read)

    def _head(self, wanted: int) -> list[dict] | None:
        """The first rows of a validation source that can be streamed; None for one that is read in place."""
        config = self.config
        if locate(config.validation, VALIDATION.source, "validation").kind in ("images", "saved", "sample"):
            return None
        stream = open_stream(
            config.validation, VALIDATION, config.image_column, config.validation_split, self.kept
        )
        records = (record for shard in range(stream.num_shards) for record in stream.read(shard))
        return [
            {config.image_column: record, **(record or {}).get("columns", {})}
            for record in islice(records, wanted)
        ]

    def fingerprint(self) -> dict[str, int | str]:
        """What tells the training source from another: {"images": their number, "sha256": of their names}.

        Where images have no names, the hash is of contents, of 64 images spread over the source. Of a stream it is
        {"files": their number, "sha256": of their names and, if local, sizes}. A folder that was moved or copied
        has the same fingerprint.
        """
        if self.config.streaming:
            files = range(self.stream.num_shards)
            keys = [f"{os.path.basename(self.stream.name(n))} {self.stream.size(n)}".encode() for n in files]
        else:
            keys = image_keys(self.images, self.config.image_column, self.config.train, most_read=64)
        digest = hashlib.sha256()
        for key in keys:
            digest.update(len(key).to_bytes(8, "big") + key)
        if self.config.streaming:
            return {"files": len(keys), "sha256": digest.hexdigest()}
        return {"images": len(self.images), "sha256": digest.hexdigest()}


def binarised_once(image: Tensor, row: int, kind: str) -> Tensor:
    """A held-out gray image (1, 1, H, W) in [-1, 1] -> -1 and 1, by its row: the same each time it is read."""
    levels = ((image + 1) * 127.5).round().to(torch.uint8).numpy()
    return torch.from_numpy(binarised(levels, kind, random.Random(f"held out/{row}"))).float() / 127.5 - 1


def _unchanged(part: dict) -> dict:
    """A `collate_fn` for parts that `StreamedImages` has collated already."""
    return part
