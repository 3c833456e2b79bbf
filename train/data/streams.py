"""Training images read in sequence, from sources too large to convert or to download first."""

import math
from collections.abc import Iterator
from itertools import count, islice

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from kl_autoencoder.data.sources import record_name

from .samples import RandomCrops, augmentation, failure, permutation, read_sample

MAX_LANES = 16  # files that are read at the same time


class StreamedImages(IterableDataset):
    """Samples `first`, `first + step` ... of a streamed source, without end.

    Samples are a pure function of their number here too. The source's shards (files) are dealt out to L lanes,
    L = 1, 2, 4, 8 or 16, in an order that is new each epoch; sample n is number n // L of lane n % L, shuffled
    within a block of shuffle_buffer // L neighbours in its shard. So shuffling is coarser than with random
    access. An unreadable image is replaced by the next of its block.

    Costs: each worker reads all of the lanes that its rank draws from and decodes its own samples only; where the
    number of ranks divides L, those lanes are 1 / ranks of the source. To start at sample n, each worker first
    reads past what comes before n in those lanes, without decoding (some 10,000 a second from a local disk).
    """

    def __init__(
        self,
        images: datasets.IterableDataset,
        column: str,
        crops: RandomCrops,
        seed: int,
        batch_size: int,
        shuffle_buffer: int,
        first: int = 0,
        step: int = 1,
    ):
        self.images, self.column, self.crops, self.seed = images, column, crops, seed
        self.batch_size, self.first, self.step = batch_size, first, step
        self.shards = images.num_shards
        self.lanes = min(MAX_LANES, 2 ** int(math.log2(self.shards)))
        self.block_size = max(1, shuffle_buffer // self.lanes)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        lanes = [Lane(self, number) for number in range(self.lanes)]
        for turn, n in enumerate(count(self.first, self.step)):
            if turn // self.batch_size % workers == worker:  # DataLoader asks its workers in turn for a batch
                try:
                    candidates = lanes[n % self.lanes].candidates(n // self.lanes)
                    yield read_sample(self.crops, n, augmentation(self.seed, n), candidates)
                except Exception as error:
                    yield failure(error)
                    return

    def read(self, shard: int) -> Iterator[list[tuple[dict, str]]]:
        """The blocks of a shard: lists of (record, name), not yet shuffled."""
        # iter(), because a plain loop would deal the shard's records out to the loader's workers
        batches = self.images.shard(num_shards=self.shards, index=shard).iter(self.block_size)
        for start, batch in zip(count(0, self.block_size), batches, strict=False):
            records = enumerate(batch[self.column], start)
            yield [(record, record_name(record, f"image {i} of shard {shard}")) for i, record in records]

    def look_at(self, images: int) -> list[tuple[dict, str]]:
        """The first records, at most so many."""
        records = (record for shard in range(self.shards) for block in self.read(shard) for record in block)
        return list(islice(records, images))


class Lane:
    """One of the sequences of shards that a stream is read as; a file is opened when it is first needed."""

    def __init__(self, stream: StreamedImages, number: int):
        self.stream, self.number = stream, number
        self.first, self.block, self.blocks = 0, [], self._blocks()

    def candidates(self, position: int) -> list[tuple[dict, str]]:
        """The record at a position, which must not fall from call to call, then those that may replace it."""
        while position >= self.first + len(self.block):
            self.first += len(self.block)
            self.block = next(self.blocks)
        at = position - self.first
        return self.block[at:] + self.block[:at]

    def _blocks(self) -> Iterator[list[tuple[dict, str]]]:
        stream, empty = self.stream, 0
        for epoch in count():
            shards = permutation(stream.shards, stream.seed, epoch)[self.number :: stream.lanes]
            for shard in shards.tolist():
                empty += 1
                for number, block in enumerate(stream.read(shard)):
                    yield [block[i] for i in permutation(len(block), stream.seed, epoch, shard, number)]
                    empty = 0
                if empty > 100 * stream.shards:  # rather than to search for ever
                    raise ValueError(f"data.train: {empty} shards in a row without an image")
