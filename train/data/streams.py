"""Training images read in sequence, from sources too large to convert or to download first."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from kl_autoencoder.data.file_streams import Stream
from kl_autoencoder.data.sources import record_name

from .samples import RandomCrops, augmentation, collate, failure, permutation, read_sample

LANES = 16  # files that are read at the same time, at least, if there are as many


class Reader(NamedTuple):
    """Worker `worker` of `workers` on rank `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1


def lane_count(shards: int, ranks: int, workers: int) -> int:
    """How many files are read at the same time by all readers together.

    A multiple of ranks * workers, so that no two read the same file: their odd part times the power of two that
    makes it 16 or more. With fewer shards than that it is halved until there are as many.
    """
    readers = ranks * workers
    odd = readers // (readers & -readers)
    lanes = odd
    while lanes < max(LANES, readers):
        lanes *= 2
    while lanes > shards and lanes % 2 == 0:
        lanes //= 2
    return lanes if lanes <= shards else 2 ** int(math.log2(shards))


def readers_of_a_file(shards: int, ranks: int, workers: int) -> float:
    """How many times the source is read in an epoch: 1 where there are as many shards as readers."""
    return max(1.0, ranks * workers / lane_count(shards, ranks, workers))


class StreamedImages(IterableDataset):
    """Samples `first`, `first + 1 * ranks` ... of a streamed source, without end, as the parts of micro-batches.

    All shards (files) of all epochs form one sequence, each epoch in an order of its own. File k of it belongs to
    lane k % L, L by `lane_count`; sample n is number n // L of lane n % L, shuffled within a block of
    shuffle_buffer // L neighbours in its file. An image that cannot be used is replaced by those
    that follow it.

    What is promised: sample n is a function of the source, the seed, n, shuffle_buffer and L. So a run that goes on
    with as many ranks and workers consumes what it would have consumed, bit for bit, and so does one with other
    numbers of both if L is the same: powers of two with up to 16 readers in all, and numbers of the same product.
    Else it goes on after as many samples as were consumed, in another order: of the epoch that it is in some images
    come once more and some not at all, as many as lie between the lanes' places then and now.

    Costs: each lane is read by one worker of one rank if there are as many files as readers (else by
    `readers_of_a_file`). To start at sample n, a reader passes over the files before it whose lengths are known:
    those of local parquet, and those in `lengths`, which were read to the end before; the others it reads.
    Blocks in memory: shuffle_buffer encoded images, over all readers.

    Worker w of W yields its part of each micro-batch, which `TrainLoader` puts together. `lengths`: name of a
    shard -> its number of records; each part tells of those that were found out since the last.
    """

    def __init__(
        self,
        stream: Stream,
        crops: RandomCrops,
        seed: int,
        batch_size: int,
        shuffle_buffer: int,
        first: int = 0,
        lengths: Mapping[str, int] | None = None,
        reader: Reader = Reader(),  # noqa: B008 - immutable
    ):
        self.stream, self.crops, self.seed, self.batch_size = stream, crops, seed, batch_size
        self.first, self.reader, self.lengths = first, reader, dict(lengths or {})
        self.shards = stream.num_shards
        self.lanes = lane_count(self.shards, reader.ranks, reader.workers)
        self.block_size = max(1, shuffle_buffer // self.lanes)
        self._orders: dict[int, np.ndarray] = {}  # those of the last epochs asked for
        self.found: list[tuple[str, int]] = []  # lengths that were found out since the last part

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        draws = self.draws(info.id if info else 0)
        try:
            for part in draws:
                samples = [read_sample(self.crops, n, augmentation(self.seed, n), found) for n, found in part]
                yield collate(samples) | {"lengths": self.found}
                self.found = []
        except Exception as error:
            yield failure(error)

    def draws(self, worker: int) -> Iterator[Iterator[tuple[int, Iterator[tuple[dict, str]]]]]:
        """For each micro-batch, the samples of it that a worker reads: their numbers and candidates.

        The samples of a rank visit its lanes in turn, always in the same order; the lanes are dealt out to the
        workers, or if there are too few of them the samples.
        """
        ranks, workers = self.reader.ranks, self.reader.workers
        own = self.lanes // math.gcd(self.lanes, ranks)  # lanes that this rank visits
        lanes: dict[int, Lane] = {}

        def mine(start: int) -> Iterator[tuple[int, Iterator[tuple[dict, str]]]]:
            for i in range(start, start + self.batch_size):
                if (i % own if own >= workers else i) % workers == worker:
                    n = self.first + self.reader.rank + i * ranks
                    number = n % self.lanes
                    if number not in lanes:
                        lanes[number] = Lane(self, number)
                    yield n, lanes[number].candidates(n // self.lanes)

        return map(mine, count(0, self.batch_size))

    def epoch_and_shard(self, k: int) -> tuple[int, int]:
        """(epoch, shard) of file k of the sequence."""
        epoch, place = divmod(k, self.shards)
        if epoch not in self._orders:
            if len(self._orders) == 4:  # lanes are in neighbouring epochs
                self._orders.pop(min(self._orders))
            self._orders[epoch] = permutation(self.shards, self.seed, epoch)
        return epoch, int(self._orders[epoch][place])

    def length(self, shard: int) -> int | None:
        name = self.stream.name(shard)
        if name not in self.lengths:
            known = self.stream.length(shard)
            if known is None:
                return None
            self.lengths[name] = known
        return self.lengths[name]

    def note_length(self, shard: int, length: int) -> None:
        """Remember what has been counted by reading a shard to its end."""
        name = self.stream.name(shard)
        if name not in self.lengths:
            self.found.append((name, length))
        self.lengths[name] = length

    def blocks(self, shard: int, start: int) -> Iterator[list[tuple[dict, str]]]:
        """The blocks of a shard from record `start`, the first of one, on: lists of (record, name), in order."""
        records, at = self.stream.read(shard, start), start
        while block := list(islice(records, self.block_size)):
            yield [
                (record, record_name(record, f"image {at + i} of shard {shard}"))
                for i, record in enumerate(block)
            ]
            at += len(block)
        self.note_length(shard, at)

    def look_at(self, images: int) -> list[tuple[dict, str]]:
        """The first records, at most so many."""
        records = (
            record for shard in range(self.shards) for block in self.blocks(shard, 0) for record in block
        )
        return list(islice(records, images))


class Lane:
    """One of the sequences of files that a stream is read as; a file is opened when it is first needed."""

    def __init__(self, stream: StreamedImages, number: int):
        self.stream = stream
        self.file = number  # the next to be opened, by its place in the sequence of all files
        self.before = 0  # records of the lane in the files before that
        self.first, self.block = 0, []  # the block that samples are drawn from, and its place in the lane
        self.ahead: deque[tuple[int, list[tuple[dict, str]]]] = deque()  # blocks after it that were looked at
        self.blocks = iter(())

    def candidates(self, position: int) -> Iterator[tuple[dict, str]]:
        """The record at a position, which must not fall from call to call, then those that may replace it."""
        while position >= self.first + len(self.block):
            self.first, self.block = self.ahead.popleft() if self.ahead else self._next_block(position)
        at = position - self.first
        yield from self.block[at:]
        yield from self.block[:at]
        for later in count():
            if later == len(self.ahead):
                self.ahead.append(self._next_block(0))
            yield from self.ahead[later][1]

    def _next_block(self, position: int) -> tuple[int, list[tuple[dict, str]]]:
        """The next block and its place in the lane; whole files and blocks before a position are passed over."""
        empty = 0
        while True:
            found = next(self.blocks, None)
            if found is not None:
                return found
            self.blocks = self._open(position)
            empty += 1
            if empty > 100 * self.stream.shards:  # rather than to search for ever
                raise ValueError(f"data.train: {empty} files in a row without an image")

    def _open(self, position: int) -> Iterator[tuple[int, list[tuple[dict, str]]]]:
        """The shuffled blocks of the lane's next file, or none if it is known to lie before a position."""
        stream, (epoch, shard) = self.stream, self.stream.epoch_and_shard(self.file)
        length = stream.length(shard)
        self.file += stream.lanes
        if length is not None and position >= self.before + length:
            self.before += length
            return
        # Where the length is not known the position may lie behind the file: it is read from its beginning.
        skipped = 0 if length is None else max(0, position - self.before) // stream.block_size
        at = skipped * stream.block_size
        for number, block in enumerate(stream.blocks(shard, at), skipped):
            order = permutation(len(block), stream.seed, epoch, shard, number)
            yield self.before + at, [block[i] for i in order]
            at += len(block)
        self.before += at
