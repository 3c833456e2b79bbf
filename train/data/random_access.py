"""Training images by random access, and the order of samples, the same for any number of ranks and workers."""

import math
import random
from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from kl_autoencoder.data.sources import Rows, record_name

from .config import DataConfig
from .labels import Labels
from .samples import augmentation, failure, permutation, read_sample
from .sizes import PERMUTE_IMAGES, PERMUTE_STEPS, Buckets, Sizes, Steps


class Draw(NamedTuple):
    """Sample number `sample` of the run is image number `index` of the training images."""

    sample: int
    index: int


class SampleOrder(Sampler[list[Draw]]):
    """An endless sequence of the micro-batches of one rank: lists of `batch_size` draws.

    Epoch e orders the `length` images by `permutation(length, seed, e)`; sample n is image number n mod `length` of
    epoch floor(n / `length`). Rank r takes samples start_sample + r, start_sample + r + world_size, and so on. An
    optimizer step on R ranks, each with A micro-batches of B samples, therefore consumes the next R * A * B samples
    of this one order, and a run can continue with another R, A or B at the sample after the last one consumed.
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


class BucketOrder(Sampler[list[Draw]]):
    """An endless sequence of the micro-batches of one rank; all samples of a step are of one bucket.

    An epoch has round(images / samples of a step) steps of each bucket, at least one, in an order of its own.
    Within a bucket, images are taken in epochs of the bucket, which may end in the middle of a step, so that all
    images of the bucket are seen equally often. Step k is a function of the sizes of the images, the seed, k and
    the number of samples of a step; ranks take its samples in steps_before, as in `SampleOrder`. A run that
    continues with another number of samples a step starts after the samples that were consumed, but in another
    order.
    """

    def __init__(self, buckets: Buckets, seed: int, batch_size: int, steps: Steps, rank=0, world_size=1):
        self.members, self.seed, self.batch_size = buckets.members(), seed, batch_size
        self.steps, self.rank, self.world_size = steps, rank, world_size
        self.steps_per_epoch = [max(1, round(len(images) / steps.samples)) for images in self.members]

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self._draws()
        while True:
            yield list(islice(draws, self.batch_size))

    def _draws(self) -> Iterator[Draw]:
        step, images = -1, np.arange(0)
        for n in count(self.steps.first + self.rank, self.world_size):
            if self.steps.of(n) != step:
                step = self.steps.of(n)
                images = self.images_of(step)
            yield Draw(n, int(images[(n - self.steps.first) % self.steps.samples]))

    def images_of(self, step: int) -> np.ndarray:
        """The numbers of the images of a step: (samples of a step,)."""
        epoch, place = divmod(step, sum(self.steps_per_epoch))
        order = np.repeat(np.arange(len(self.steps_per_epoch)), self.steps_per_epoch)
        order = order[permutation(len(order), self.seed, epoch, PERMUTE_STEPS)]
        bucket = int(order[place])
        # Steps of this bucket that came before, in all epochs.
        steps_before = epoch * self.steps_per_epoch[bucket] + np.count_nonzero(order[:place] == bucket)
        return self._images_at(bucket, steps_before * self.steps.samples)

    def _images_at(self, bucket: int, first: int) -> np.ndarray:
        """The images of a bucket for one step: (samples of a step,), from place `first` of its joined epochs on."""
        images, wanted = self.members[bucket], range(first, first + self.steps.samples)
        epochs = range(wanted[0] // len(images), wanted[-1] // len(images) + 1)
        orders = [permutation(len(images), self.seed, epoch, PERMUTE_IMAGES, bucket) for epoch in epochs]
        start = first - epochs[0] * len(images)
        return images[np.concatenate(orders)[start : start + len(wanted)]]


def replacements(index: int, length: int, rng: random.Random) -> Iterator[int]:
    """Yield `index`, then all other indices below `length` once, as replacements of an image that cannot be used.

    They follow at a stride drawn by `rng`: with a stride of 1, the first image after a damaged shard would replace
    every image of that shard.
    """
    yield index
    stride = 1 + int(rng.random() * length)
    while math.gcd(stride, length) != 1:  # else it would not reach all indices
        stride = stride % length + 1
    yield from ((index + k * stride) % length for k in range(1, length))


class TrainImages(Dataset):
    """The training images by random access: `dataset[Draw(n, index)]` -> sample n, as `read_sample` returns it.

    images: the opened source; rows: the numbers of its rows to train on; sizes: the crop size of each sample;
    buckets: the bucket of each image, None for square crops. An image that cannot be used is replaced by another,
    chosen by the seed and n alone. An error is returned as a `failure`, not raised.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        images: Rows,
        rows: np.ndarray,
        labels: Labels | None,
        sizes: Sizes,
        buckets: Buckets | None = None,
    ):
        self.seed, self.images, self.column, self.crops = seed, images, config.image_column, config.crops
        self.rows, self.labels, self.sizes = rows, labels, sizes
        self.bucket_of = None if buckets is None else buckets.of_image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict:
        rng = augmentation(self.seed, draw.sample)
        records = map(self.record, replacements(draw.index, len(self), rng))
        try:
            return read_sample(self.crops, self.size(draw), draw.sample, rng, records, self.labels)
        except Exception as error:
            return failure(error)

    def size(self, draw: Draw) -> tuple[int, int]:
        """Size (H, W) in pixels of the crop of a sample."""
        return self.sizes.of(draw.sample, 0 if self.bucket_of is None else int(self.bucket_of[draw.index]))

    def some_records(self, most: int) -> list[tuple[dict, str]]:
        """At most `most` records, each with its name, spread evenly over the training images."""
        return [self.record(i) for i in np.unique(np.linspace(0, len(self) - 1, most).astype(int))]

    def record(self, index: int) -> tuple[dict, str]:
        """The record {"bytes", "path", "columns": {name: value}} of training image `index`, and its name."""
        row = int(self.rows[index])
        values = self.images[row]
        record = values[self.column]
        return {**(record or {}), "columns": values}, record_name(record, f"row {row}")
