"""From a source of photographs to batches (B, 3, H, W) in [-1, 1], resumable at any sample.

Sample number n, counted from 0 over the whole run and over all ranks, is a pure function of the source, the
seed and n: which photograph, which crop, flipped or not. So a run goes on at sample n with any number of ranks
and workers, and the trainer's count of the samples it has consumed is all there is to save.
"""

import math
import multiprocessing
import random
import signal
from collections.abc import Iterator
from itertools import count, islice
from multiprocessing.util import Finalize
from typing import Annotated, NamedTuple

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kl_autoencoder.data.image_io import load_image, open_image
from kl_autoencoder.data.sources import Keys, encoded_file, open_source, record_name
from kl_autoencoder.distributed import end_with_the_parent

from ..settings import Number, key, section
from .samples import (
    RandomCrops,
    SkippedImages,
    augmentation,
    check_images,
    collate,
    failure,
    permutation,
    read_sample,
)
from .streams import StreamedImages

LOOKED_AT = 32  # images whose headers are read before any work starts
TRAIN, VALIDATION = Keys("data.train", "data.image_column"), Keys("data.validation", "data.image_column")
HELD_OUT = 0  # key of the permutation that chooses held-out images


@section
class DataConfig:
    """What is trained on. Sources are folders, files and data sets, see `kl_autoencoder.data.locating.KINDS`."""

    train: str = key(..., "the source of the images: a folder, parquet or webdataset files, a hub id ...")
    validation: str | None = key(None, "a source of held-out images; null holds some of data.train out")
    image_column: str = key(
        "image", "of parquet, saved and hub sources; of webdatasets the suffix, such as jpg"
    )
    split: str = key("train", "the split of a hub or saved source that is trained on")
    validation_split: str = key("validation", "the split of a hub or saved source that is held out")
    resolution: int = key(256, "side in pixels of the square crops", low=1, high=8192)
    batch_size: int = key(8, "images per device and forward pass", low=1, high=10**4)
    num_workers: int = key(
        4, "processes a device that decode; 0 decodes in the training process", low=0, high=1024
    )
    crop_scale: tuple[Annotated[Number, Field(ge=0, le=1)], ...] = key(
        (0.25, 1.0),
        "range of the crop's area as a share of the largest square in the image, as torchvision's "
        "RandomResizedCrop with ratio 1; a crop is at least `resolution` wide where the image is",
    )
    horizontal_flip: bool = key(True, "mirror every other crop, by chance")
    validation_images: int = key(64, "at most so many held-out images are looked at", low=1, high=10**6)
    validation_resolution: int | None = key(
        None, "side of the held-out images; null: resolution", low=1, high=8192
    )
    streaming: bool = key(False, "read parquet, webdataset and hub sources in sequence, see `StreamedImages`")
    shuffle_buffer: int = key(
        1000, "samples of a stream that are in memory to be shuffled", low=1, high=10**7
    )

    def __post_init__(self):
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"data.crop_scale: {list(scale)}; allowed: two rising numbers above 0 and up to 1"
            )
        if self.streaming and self.validation is None:
            raise ValueError(
                "data.validation: null with data.streaming; allowed: a source (nothing can be held out of a stream)"
            )

    @property
    def crops(self) -> RandomCrops:
        return RandomCrops(self.resolution, tuple(self.crop_scale), self.horizontal_flip)


class Draw(NamedTuple):
    """Sample number `sample` of the run is image number `index` of the training images."""

    sample: int
    index: int


class SampleOrder(Sampler[list[Draw]]):
    """The micro-batches of one rank, without end: lists of `batch_size` draws.

    Epoch e is permutation(seed, e) of the images, sample n is image n % length of epoch n // length. Rank r takes
    samples start_sample + r, start_sample + r + world_size ...: so an optimizer step over R ranks, micro-batches
    of B and A of them consumes the next R * B * A samples of the one order, whatever R, B and A are.
    """

    def __init__(self, length: int, seed: int, batch_size: int, start_sample=0, rank=0, world_size=1):
        self.length, self.seed, self.batch_size = length, seed, batch_size
        self.start_sample, self.rank, self.world_size = start_sample, rank, world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self._draws()
        while True:
            yield list(islice(draws, self.batch_size))

    def _draws(self) -> Iterator[Draw]:
        epoch, order = -1, None
        for n in count(self.start_sample + self.rank, self.world_size):
            if n // self.length != epoch:
                epoch = n // self.length
                order = permutation(self.length, self.seed, epoch)
            yield Draw(n, int(order[n % self.length]))


def replacements(index: int, length: int, rng: random.Random) -> Iterator[int]:
    """`index`, and should that be unreadable, every other index once, in steps that `rng` chooses.

    In steps of 1 the image behind a damaged shard would stand for the whole shard.
    """
    yield index
    stride = 1 + int(rng.random() * length)
    while math.gcd(stride, length) != 1:
        stride = stride % length + 1
    yield from ((index + k * stride) % length for k in range(1, length))


def split_rows(config: DataConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training source to train on, and those held out: the same for every seed and run."""
    if config.validation is not None:
        return np.arange(length), np.arange(0)
    if config.validation_images >= length:
        raise ValueError(
            f"data.validation_images: {config.validation_images}, to be held out of the {length} images of "
            f"{config.train}; allowed: fewer, or a source of their own as data.validation"
        )
    rows = permutation(length, HELD_OUT)
    return np.sort(rows[config.validation_images :]), np.sort(rows[: config.validation_images])


class TrainImages(Dataset):
    """The training images by random access: `dataset[Draw(n, index)]` -> sample n.

    An image that cannot be read is replaced by another, chosen by the seed and n alone.
    """

    def __init__(self, config: DataConfig, seed: int, images: datasets.Dataset):
        self.seed, self.images, self.column, self.crops = seed, images, config.image_column, config.crops
        self.rows, _ = split_rows(config, len(images))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict:
        rng = augmentation(self.seed, draw.sample)
        candidates = map(self.record, replacements(draw.index, len(self), rng))
        try:
            return read_sample(self.crops, draw.sample, rng, candidates)
        except Exception as error:
            return failure(error)

    def look_at(self, images: int) -> list[tuple[dict, str]]:
        """At most so many records, spread over the source."""
        return [self.record(i) for i in np.unique(np.linspace(0, len(self) - 1, images).astype(int))]

    def record(self, index: int) -> tuple[dict, str]:
        row = int(self.rows[index])
        record = self.images[row][self.column]
        return record, record_name(record, f"row {row}")


class LoaderFailed(RuntimeError):
    """The training data cannot be read any further; the message is one line."""


class TrainLoader:
    """The batches of a `DataLoader`; its workers end with the iteration and with this process, however it ends.

    `next` raises LoaderFailed for whatever goes wrong in a worker, one that was killed included. The workers are
    killed then: they leave SIGTERM to the trainer, and multiprocessing would wait for them for ever.
    """

    def __init__(self, loader: DataLoader):
        self.loader, self.dataset = loader, loader.dataset

    def __iter__(self) -> Iterator[dict]:
        others = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        # torch's handler would raise a worker's death in the middle of a step; `next` notices within 5 seconds.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        # The priority puts it before multiprocessing's own end of this process, whatever else ends that.
        end = Finalize(None, _kill, args=(workers,), exitpriority=1)
        try:
            while True:
                failure = None
                try:
                    batch = next(batches)
                except (
                    Exception
                ) as error:  # torch's own words on a worker that was killed, and on damage between them
                    failure = (
                        f"data.num_workers: a worker ended, of too little memory perhaps ({_one_line(error)})"
                    )
                if failure or "failure" in batch:
                    break
                yield batch
        finally:
            end()
        raise LoaderFailed(failure or batch["failure"])


def _kill(workers: list[multiprocessing.Process]) -> None:
    for worker in workers:
        worker.kill()


def _one_line(error: BaseException) -> str:
    """The last line that says something: torch puts the traceback of a worker before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def train_loader(
    config: DataConfig, seed: int, start_sample: int = 0, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """The micro-batches of rank `rank` of `world_size`, from sample `start_sample` of the run on, without end.

    A batch is {"images": (B, 3, R, R) float32 in [-1, 1], "sample": (B,) int64, numbers of its samples, "skipped":
    [(name, reason), ...], the unreadable images met, for `SkippedImages`}. The numbers of different ranks
    interleave, see `SampleOrder`. Workers read ahead, so `start_sample` of a continued run is the trainer's own
    count of consumed samples, over all ranks, not anything of the loader's.

    Do not pass it to accelerate's `prepare`, which would deal the batches out to the ranks a second time.
    Raises ValueError or FileNotFoundError for a source that cannot be used.
    """
    images = open_source(config.train, TRAIN, config.image_column, config.split, config.streaming)
    if isinstance(images, datasets.IterableDataset):
        dataset = StreamedImages(
            images, config.image_column, config.crops, seed=seed, batch_size=config.batch_size,
            shuffle_buffer=config.shuffle_buffer, first=start_sample + rank, step=world_size,
        )  # fmt: skip
        order = {"batch_size": config.batch_size}
    elif config.streaming:
        raise ValueError(
            f"data.streaming: true, but {config.train} is read in place in any case; allowed: false"
        )
    else:
        dataset = TrainImages(config, seed, images)
        sampler = SampleOrder(len(dataset), seed, config.batch_size, start_sample, rank, world_size)
        order = {"batch_sampler": sampler}
    check_images(config.train, config.resolution, dataset.look_at(LOOKED_AT))
    loader = DataLoader(
        dataset,
        **order,
        num_workers=config.num_workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each new iterator advances torch's global generator
    )
    return TrainLoader(loader)


def start_worker(worker: int) -> None:
    """What each worker does first: leave interrupts to the trainer, and end when it ends."""
    end_with_the_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler signals every process of a job
        signal.signal(number, signal.SIG_IGN)


def validation_images(config: DataConfig) -> Tensor:
    """The held-out images, at most `config.validation_images`: (N, 3, R, R), float32 in [-1, 1].

    The short side is scaled to R, the validation resolution, and the centre square cropped. They come from
    `config.validation`, drawn at random where it has more (of a stream, the first), or are held out of the
    training source; the same for every seed. Unreadable ones are left out with a warning. Raises ValueError if
    none is left, and as `train_loader`.
    """
    skipped, crops = SkippedImages(), []
    for record, name in _validation_records(config):
        try:
            image = open_image(encoded_file(record, name))
            crops.append(load_image(image, config.validation_resolution or config.resolution, multiple_of=1))
        except (ValueError, OSError) as error:
            skipped.add([(name, str(error).removeprefix(f"{name}: "))])
    if not crops:
        raise ValueError(f"data.validation: no readable images in {config.validation or config.train}")
    return torch.cat(crops)


def _validation_records(config: DataConfig) -> list[tuple[dict, str]]:
    column, wanted = config.image_column, config.validation_images
    if config.validation is None:
        images = open_source(config.train, TRAIN, column, config.split)
        _, rows = split_rows(config, len(images))
    else:
        split, streaming = config.validation_split, config.streaming
        images = open_source(config.validation, VALIDATION, column, split, streaming, samples="validation")
        if isinstance(images, datasets.IterableDataset):
            head = next(images.iter(wanted), {column: []})[column]
            return [(record, record_name(record, f"image {i}")) for i, record in enumerate(head)]
        rows = np.sort(permutation(len(images), HELD_OUT)[:wanted])
    records = [images[int(row)][column] for row in rows]
    return [(record, record_name(record, f"row {row}")) for record, row in zip(records, rows, strict=True)]
