"""`TrainingData`: batches (B, C, H, W) in [-1, 1], resumable at any sample, and held-out images.

Sample n, counted from 0 over the whole run and all ranks, is a function of the source, the seed and n alone: which
image, which crop, mirrored or not. A checkpoint therefore holds only how many samples were consumed, and a run
continues at the next one on any number of ranks and workers. `StreamedImages` says how far this holds for streams.
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
from .sizes import Buckets, Sizes, Steps, describe_sizes, read_sizes, sort_into_buckets
from .streams import Reader, StreamedImages, readers_of_a_file

HELD_OUT = 64  # held-out images where data.validation_images is null
IMAGES_CHECKED = 32  # training images whose headers are read before any work starts
TRAIN, VALIDATION = (
    Keys(f"data.{source}", "data.image_column", "data.label_column") for source in ("train", "validation")
)
PERMUTE_VALIDATION = 0  # key of the permutation that chooses images of data.validation

log = logging.getLogger(__name__)


def split_rows(config: DataConfig, images: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Split the training source: its rows to train on and its held-out rows, ascending, the same for every seed.

    Held out are the images with the smallest hashes of their names (of their contents, if they have no names). An
    image that is added to the source thus replaces at most one held-out image, and an image that was trained on is
    held out later only if a held-out one is removed. If `data.validation` is given, all rows are
    trained on. Raises ValueError if no image would be left to train on.
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

    classes: the number of classes that the network knows, None for any. multiple: sides of crops in buckets are
    multiples of it. samples_per_step: over all ranks (None: batch_size); the samples of a step have one size.
    Raises FileNotFoundError or ValueError for a training source that cannot be used, and ValueError for classes out
    of range.
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
        # Name -> number of records, of the shards of a stream that were read to the end.
        self.lengths: dict[str, int] = {}
        self.kept_columns = [] if config.label_column is None else [config.label_column]
        source = Source(config.train, config.image_column, config.label_column, config.labels == "folders")
        if config.streaming:
            self.stream = open_stream(
                config.train, TRAIN, config.image_column, config.split, self.kept_columns
            )
            self.labels = labels_of_stream(source, self.stream, classes)
        else:
            self.images = open_source(
                config.train, TRAIN, config.image_column, config.split, keep=self.kept_columns
            )
            self.rows, self.held_out_rows = split_rows(config, self.images)
            self.labels = labels_of_rows(source, self.images, classes)
        largest = max(config.resolutions)
        targets = buckets(largest, multiple) if config.buckets else [(largest, largest)]
        records = self._dataset().some_records(IMAGES_CHECKED)
        check_images(config.train, config.too_small == "enlarge", largest, targets, records)
        if config.buckets:
            self.buckets = self._sort_into_buckets()

    def _sort_into_buckets(self) -> Buckets:
        """Sort the training images into buckets, by their headers."""
        sizes = read_sizes(self._dataset())
        return sort_into_buckets(sizes, self.config.resolutions[0], self.multiple, self.samples_per_step)

    @property
    def number_of_sizes(self) -> int:
        """How many different sizes crops have."""
        return len(set(self.config.resolutions)) * (1 if self.buckets is None else len(self.buckets.sizes))

    def announced(self) -> str:
        """A line that names the sizes of crops; "" if all are squares of one size."""
        return describe_sizes(self.config.resolutions, self.buckets, self.samples_per_step)

    def loader(
        self, start_sample: int = 0, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> TrainLoader:
        """An endless sequence of the micro-batches of rank `rank` of `world_size`, from sample `start_sample` on.

        A batch is {"images": (B, C, H, W) float32 in [-1, 1], "sample": (B,) int64, the numbers of its samples,
        "skipped": [(name, reason), ...], images that could not be used, for `SkippedImages`, and, if images have
        classes, "labels": (B,) int64}. The sample numbers of different ranks interleave, see `SampleOrder`. Workers
        read ahead; the `start_sample` of a continued run is therefore the number of samples that the trainer has
        consumed, over all ranks, not of those that were read.

        Do not pass it to accelerate's `prepare`, which would divide the batches among the ranks a second time.
        """
        config, dataset = self.config, self._dataset(start_sample, rank, world_size)
        parts = max(config.num_workers, 1) if config.streaming else 1
        if config.streaming:
            order = {"batch_size": None}  # the data set itself yields parts of batches
            order |= {"prefetch_factor": 2 * parts} if config.num_workers else {}
            self._warn_of_shared_files(rank, world_size, parts)
        else:
            order = {"batch_sampler": self._order(start_sample, rank, world_size)}
        loader = DataLoader(
            dataset,
            **order,
            num_workers=config.num_workers,
            collate_fn=_identity if config.streaming else collate,
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
        """The held-out images: at most `validation_images`, square, the same for every seed.

        Their side is `DataConfig.held_out_side`. They are the held-out rows of the training source, or images of
        `data.validation`: a random choice if it has more, the first ones if it is streamed. Raises the same errors
        as the constructor.
        """
        config = self.config
        column, wanted = config.image_column, config.validation_images or HELD_OUT
        size = config.held_out_side
        read = {"smallest": 1, "channels": config.channels, "label": self.labels}
        if config.binarize:
            read["transform"] = partial(binarised_once, kind=config.binarize)
        if config.validation is None:
            return Photographs(self.images, config.train, size, column, self.held_out_rows, **read)
        if config.streaming and (head := self._first_rows(wanted)) is not None:
            return Photographs(head, config.validation, size, column, **read)
        split = config.validation_split
        images = open_source(config.validation, VALIDATION, column, split, "validation", self.kept_columns)
        rows = np.sort(permutation(len(images), PERMUTE_VALIDATION)[:wanted])
        return Photographs(images, config.validation, size, column, rows, **read)

    def _first_rows(self, wanted: int) -> list[dict] | None:
        """The first `wanted` rows of the validation source, streamed; None for a source that is read in place."""
        config = self.config
        if locate(config.validation, VALIDATION.source, "validation").kind in ("images", "saved", "sample"):
            return None
        stream = open_stream(
            config.validation, VALIDATION, config.image_column, config.validation_split, self.kept_columns
        )
        records = (record for shard in range(stream.num_shards) for record in stream.read(shard))
        return [
            {config.image_column: record, **(record or {}).get("columns", {})}
            for record in islice(records, wanted)
        ]

    def fingerprint(self) -> dict[str, int | str]:
        """Identify the training source: {"images": number of images, "sha256": hash of their names}.

        If images have no names, the hash is of the contents of 64 of them, spread over the source. For a stream it
        is {"files": number of files, "sha256": hash of their names and, of local files, sizes}. A folder has the
        same fingerprint after it was moved or copied.
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
    """Make a held-out gray image (1, 1, H, W) in [-1, 1] black (-1) and white (1), the same each time for a row."""
    levels = ((image + 1) * 127.5).round().to(torch.uint8).numpy()
    return torch.from_numpy(binarised(levels, kind, random.Random(f"held out/{row}"))).float() / 127.5 - 1


def _identity(part: dict) -> dict:
    """The `collate_fn` for the parts of batches of `StreamedImages`, which are collated already."""
    return part
