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

from .labels import Labels
from .samples import RandomCrops, augmentation, collate, failure, permutation, read_sample
from .sizes import Sizes

LANES = 16  # least number of files that are read at the same time, if there are as many


class Reader(NamedTuple):
    """Worker `worker` of `workers` on rank `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1


def lane_count(shards: int, ranks: int, workers: int) -> int:
    """How many files are read at the same time by all readers together.

    A multiple of the number of readers, ranks * workers, so that no two readers share a file: its odd part times
    the least power of two that gives at least `LANES` and at least one lane a reader. With fewer shards than that,
    it is halved until there are enough shards, or as often as it is even; if that is not enough, the largest power
    of two that there are shards for.
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
    """The samples `first + rank`, `first + rank + ranks` ... of a streamed source, in parts of batches, for ever.

    The shards (files) of all epochs form one sequence, each epoch in an order of its own. They are read as L lanes
    (`lane_count`): file k belongs to lane k % L, and sample n is record n // L of lane n % L. With L = 4:

        lane 0: files 0, 4, 8 ...    samples 0, 4, 8 ...
        lane 1: files 1, 5, 9 ...    samples 1, 5, 9 ...
        lane 2: files 2, 6, 10 ...   samples 2, 6, 10 ...
        lane 3: files 3, 7, 11 ...   samples 3, 7, 11 ...

    The records of a file are shuffled within blocks of shuffle_buffer // L neighbours. An image that cannot be used
    is replaced by one that follows it.

    Resuming: sample n is a function of the source, the seed, n, shuffle_buffer and L. With the same L, a run
    therefore continues with the very samples that it would have consumed. L is the same for the same numbers of
    ranks and workers, for the same product of both, and for powers of two with up to 16 readers in all. With
    another L, the run continues after as many samples as were consumed, but in another order: in the current epoch,
    some images are then seen once more and some not at all, as many as lie between the places of the lanes then and
    now.

    Costs: each lane is read by one worker of one rank if there are as many files as readers (else by
    `readers_of_a_file` of them). To start at sample n, a reader skips the files before it whose lengths are known:
    those of local parquet, and those in `lengths`, which were read to the end before; it reads the others.
    All readers together keep shuffle_buffer encoded images in memory.

    Worker w of W yields its part of each micro-batch; `TrainLoader` joins the parts. `lengths`: name of a shard ->
    its number of records; each part holds those that were found since the part before.
    """

    def __init__(
        self,
        stream: Stream,
        crops: RandomCrops,
        sizes: Sizes,
        seed: int,
        batch_size: int,
        shuffle_buffer: int,
        first: int = 0,
        lengths: Mapping[str, int] | None = None,
        reader: Reader = Reader(),  # noqa: B008 - immutable
        labels: Labels | None = None,
    ):
        self.stream, self.crops, self.sizes, self.seed, self.batch_size = (
            stream,
            crops,
            sizes,
            seed,
            batch_size,
        )
        self.first, self.reader, self.lengths = first, reader, dict(lengths or {})
        self.labels = labels
        self.shards = stream.num_shards
        self.lanes = lane_count(self.shards, reader.ranks, reader.workers)
        self.block_size = max(1, shuffle_buffer // self.lanes)
        self._orders: dict[int, np.ndarray] = {}  # those of the last epochs asked for
        self.found: list[tuple[str, int]] = []  # lengths found since the last part

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        draws = self.draws(info.id if info else 0)
        try:
            for part in draws:
                samples = [
                    read_sample(
                        self.crops, self.sizes.of(n), n, augmentation(self.seed, n), records, self.labels
                    )
                    for n, records in part
                ]
                yield collate(samples) | {"lengths": self.found}
                self.found = []
        except Exception as error:
            yield failure(error)

    def draws(self, worker: int) -> Iterator[Iterator[tuple[int, Iterator[tuple[dict, str]]]]]:
        """For each micro-batch, the samples that a worker reads: (number, records) as for `read_sample`.

        The samples of a rank visit its lanes in turn, always in the same order. Each worker takes some of the
        lanes, or, where there are fewer lanes than workers, some of the samples.
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
                    yield n, lanes[number].records_from(n // self.lanes)

        return map(mine, count(0, self.batch_size))

    def epoch_and_shard(self, k: int) -> tuple[int, int]:
        """(epoch, shard) of file k of the sequence."""
        epoch, place = divmod(k, self.shards)
        if epoch not in self._orders:
            if len(self._orders) == 4:  # enough, since lanes are at most in neighbouring epochs
                self._orders.pop(min(self._orders))
            self._orders[epoch] = permutation(self.shards, self.seed, epoch)
        return epoch, int(self._orders[epoch][place])

    def length(self, shard: int) -> int | None:
        """The number of records of a shard; None until it has been read to the end, or the stream knows it."""
        name = self.stream.name(shard)
        if name not in self.lengths:
            known = self.stream.length(shard)
            if known is None:
                return None
            self.lengths[name] = known
        return self.lengths[name]

    def note_length(self, shard: int, length: int) -> None:
        """Remember the number of records of a shard that was read to its end."""
        name = self.stream.name(shard)
        if name not in self.lengths:
            self.found.append((name, length))
        self.lengths[name] = length

    def blocks(self, shard: int, start: int) -> Iterator[list[tuple[dict, str]]]:
        """The blocks of a shard, lists of (record, name), from record `start` on, which is the first of a block."""
        records, at = self.stream.read(shard, start), start
        while block := list(islice(records, self.block_size)):
            yield [
                (record, record_name(record, f"image {at + i} of shard {shard}"))
                for i, record in enumerate(block)
            ]
            at += len(block)
        self.note_length(shard, at)

    def some_records(self, most: int) -> list[tuple[dict, str]]:
        """The first records with their names, at most `most`."""
        records = (
            record for shard in range(self.shards) for block in self.blocks(shard, 0) for record in block
        )
        return list(islice(records, most))


class Lane:
    """One of the sequences of files that a stream is read as; a file is opened when it is first needed."""

    def __init__(self, stream: StreamedImages, number: int):
        self.stream = stream
        self.file = number  # place of the next file to open in the sequence of all files
        self.before = 0  # records of the lane in the files before it
        self.first, self.block = 0, []  # the current block, and the position of its first record in the lane
        # later blocks, with their positions, that replacements were taken from
        self.ahead: deque[tuple[int, list[tuple[dict, str]]]] = deque()
        self.blocks = iter(())

    def records_from(self, position: int) -> Iterator[tuple[dict, str]]:
        """The record at a position of the lane, then those that may replace it: its block, then later blocks.

        Positions must not decrease from call to call.
        """
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
        """The next block and its position in the lane; what ends before `position` may be skipped."""
        empty = 0
        while True:
            found = next(self.blocks, None)
            if found is not None:
                return found
            self.blocks = self._open(position)
            empty += 1
            if empty > 100 * self.stream.shards:  # rather than search for ever
                raise ValueError(f"data.train: {empty} files in a row without an image")

    def _open(self, position: int) -> Iterator[tuple[int, list[tuple[dict, str]]]]:
        """The shuffled blocks of the lane's next file; none if the file is known to end before `position`."""
        stream, (epoch, shard) = self.stream, self.stream.epoch_and_shard(self.file)
        length = stream.length(shard)
        self.file += stream.lanes
        if length is not None and position >= self.before + length:
            self.before += length
            return
        # A file of unknown length may end before the position: it is read from its beginning.
        skipped = 0 if length is None else max(0, position - self.before) // stream.block_size
        at = skipped * stream.block_size
        for number, block in enumerate(stream.blocks(shard, at), skipped):
            order = permutation(len(block), stream.seed, epoch, shard, number)
            yield self.before + at, [block[i] for i in order]
            at += len(block)
        self.before += at
