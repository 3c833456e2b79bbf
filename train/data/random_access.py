"""Training images by random access: the order of samples, the same for any number of ranks and workers."""

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
from .sizes import IMAGES, STEPS, Buckets, Sizes, Steps


class Draw(NamedTuple):
    """Sample number `sample` of the run is image number `index` of the training images."""

    sample: int
    index: int


class SampleOrder(Sampler[list[Draw]]):
    """The micro-batches of one rank, without end: lists of `batch_size` draws.

    Epoch e is permutation(seed, e) of the images; sample n is image n % length of epoch n // length. Rank r takes
    samples start_sample + r, start_sample + r + world_size, and so on. An optimizer step on R ranks, each with A
    micro-batches of B samples, therefore consumes the next R * A * B samples of this one order. A run that
    continues with another R, A or B starts at the sample after the last that was consumed.
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
    """The micro-batches of one rank, without end, all samples of a step being of one bucket.

    An epoch has round(images / samples of a step) steps of each bucket, in an order of its own. The images of a
    bucket follow one another in epochs of the bucket, so that each is seen as often as any other of it; where one
    epoch of the bucket ends in the middle of a step, the next begins there. Step k is a function of the sizes of
    images, the seed, k and the samples of a step; ranks take its samples in turn, as in `SampleOrder`. A run that
    continues with another number of samples a step goes on after as many samples, in another order.
    """

    def __init__(self, buckets: Buckets, seed: int, batch_size: int, steps: Steps, rank=0, world_size=1):
        self.members, self.seed, self.batch_size = buckets.members(), seed, batch_size
        self.steps, self.rank, self.world_size = steps, rank, world_size
        self.turns = [max(1, round(len(images) / steps.samples)) for images in self.members]

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
        """The numbers of the images of a step, (samples of a step,)."""
        epoch, place = divmod(step, sum(self.turns))
        order = np.repeat(np.arange(len(self.turns)), self.turns)
        order = order[permutation(len(order), self.seed, epoch, STEPS)]
        bucket = int(order[place])
        turn = epoch * self.turns[bucket] + np.count_nonzero(order[:place] == bucket)
        return self._next_of(bucket, turn * self.steps.samples)

    def _next_of(self, bucket: int, first: int) -> np.ndarray:
        """The images of a bucket from place `first` of its epochs on, as many as a step has."""
        images, wanted = self.members[bucket], range(first, first + self.steps.samples)
        epochs = range(wanted[0] // len(images), wanted[-1] // len(images) + 1)
        orders = [permutation(len(images), self.seed, epoch, IMAGES, bucket) for epoch in epochs]
        start = first - epochs[0] * len(images)
        return images[np.concatenate(orders)[start : start + len(wanted)]]


def replacements(index: int, length: int, rng: random.Random) -> Iterator[int]:
    """Yield `index`, then every other index once, to be read in place of unreadable ones; `rng` chooses the stride.

    With a stride of 1, the first image after a damaged shard would replace all images of that shard.
    """
    yield index
    stride = 1 + int(rng.random() * length)
    while math.gcd(stride, length) != 1:
        stride = stride % length + 1
    yield from ((index + k * stride) % length for k in range(1, length))


class TrainImages(Dataset):
    """The training images by random access: `dataset[Draw(n, index)]` -> sample n.

    An image that cannot be read is replaced by another, chosen by the seed and n alone. buckets: of the images,
    where crops have the shape of a bucket.
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
        """(H, W) of the crop of a sample."""
        return self.sizes.of(draw.sample, 0 if self.bucket_of is None else int(self.bucket_of[draw.index]))

    def some_records(self, most: int) -> list[tuple[dict, str]]:
        """At most `most` records with their names, spread over the source."""
        return [self.record(i) for i in np.unique(np.linspace(0, len(self) - 1, most).astype(int))]

    def record(self, index: int) -> tuple[dict, str]:
        """The record {"bytes", "path", "columns": its row} of training image `index`, and its name for messages."""
        row = int(self.rows[index])
        values = self.images[row]
        record = values[self.column]
        return {**(record or {}), "columns": values}, record_name(record, f"row {row}")
