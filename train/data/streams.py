"""Training images read in sequence, from sources that are too large to be downloaded or converted first."""

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

LANES = 16  # as many files, or more, are read at the same time if there are enough


class Reader(NamedTuple):
    """Who reads a stream: rank `rank` of `ranks`, each with `workers` workers."""

    rank: int = 0
    ranks: int = 1
    workers: int = 1


def lane_count(shards: int, ranks: int, workers: int) -> int:
    """Return how many files all readers (ranks * workers) together read at the same time.

    With readers = odd * 2^j it is the smallest odd * 2^k that is at least `LANES` and at least the number of
    readers: a multiple of the number of readers, so that no two readers share a file. With fewer shards, k is
    lowered until there are as many shards; if even `odd` is too many, it is the largest power of two up to
    `shards`.
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
    """How many readers read each file, on average: 1 if there are enough files, more if readers have to share."""
    return max(1.0, ranks * workers / lane_count(shards, ranks, workers))


class StreamedImages(IterableDataset):
    """An endless stream of a rank's samples, `first + rank`, `first + rank + ranks` ..., in parts of micro-batches.

    The shards (files) of all epochs form one sequence, each epoch in an order of its own. They are read in L lanes
    (`lane_count`): file k belongs to lane k % L, and sample n is record n // L of lane n % L. With L = 4:

        lane 0: files 0, 4, 8 ...    samples 0, 4, 8 ...
        lane 1: files 1, 5, 9 ...    samples 1, 5, 9 ...
        lane 2: files 2, 6, 10 ...   samples 2, 6, 10 ...
        lane 3: files 3, 7, 11 ...   samples 3, 7, 11 ...

    The records of a file are shuffled within blocks of shuffle_buffer // L neighbours. An image that cannot be used
    is replaced by another one of its block, or of a later block.

    Resuming: sample n is a function of the source, the seed, n, shuffle_buffer and L. With the same L, a continued
    run therefore takes exactly the samples that it would have taken. For one source, L depends on the number of
    readers (ranks * workers) alone, and is the same for 1, 2, 4, 8 and 16 of them. With another L, the run
    continues after as many samples as were consumed, but in another order: some images of the current epoch are
    then seen twice and some not at all, as many as lie between the positions of the old and the new lanes.

    Costs: each lane is read by one worker of one rank, or, if there are fewer files than readers, by
    `readers_of_a_file` of them. To start at sample n, a reader skips earlier files of known length (local parquet
    files, and those in `lengths`, which were once read to the end) and reads through the others. All readers
    together keep shuffle_buffer encoded images in memory.

    Each worker yields its part of each micro-batch, the result of `collate` or a `failure`; `TrainLoader` joins the
    parts. `lengths`: name of a shard -> its number of records; under "lengths", a part has those that were found
    since the part before.
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
        self.stream, self.crops, self.sizes, self.seed = stream, crops, sizes, seed
        self.batch_size = batch_size
        self.first, self.reader, self.lengths = first, reader, dict(lengths or {})
        self.labels = labels
        self.shards = stream.num_shards
        self.lanes = lane_count(self.shards, reader.ranks, reader.workers)
        self.block_size = max(1, shuffle_buffer // self.lanes)
        self._shard_orders: dict[int, np.ndarray] = {}  # epoch -> order of its shards, of the last epochs
        # (name, records) of the shards that were read to the end since the last part
        self.new_lengths: list[tuple[str, int]] = []

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
                yield collate(samples) | {"lengths": self.new_lengths}
                self.new_lengths = []
        except Exception as error:
            yield failure(error)

    def draws(self, worker: int) -> Iterator[Iterator[tuple[int, Iterator[tuple[dict, str]]]]]:
        """Yield for each micro-batch the samples that a worker reads, as (number, records) for `read_sample`.

        The samples of a rank come from its lanes in turn, always in the same order. Each worker reads some of the
        lanes; if there are fewer lanes than workers, it reads some of the samples of a lane.
        """
        ranks, workers = self.reader.ranks, self.reader.workers
        lanes_of_rank = self.lanes // math.gcd(self.lanes, ranks)  # how many of the lanes this rank reads
        lanes: dict[int, Lane] = {}

        def samples_of_batch(start: int) -> Iterator[tuple[int, Iterator[tuple[dict, str]]]]:
            for i in range(start, start + self.batch_size):
                if (i % lanes_of_rank if lanes_of_rank >= workers else i) % workers == worker:
                    n = self.first + self.reader.rank + i * ranks
                    number = n % self.lanes
                    if number not in lanes:
                        lanes[number] = Lane(self, number)
                    yield n, lanes[number].records_from(n // self.lanes)

        return map(samples_of_batch, count(0, self.batch_size))

    def epoch_and_shard(self, k: int) -> tuple[int, int]:
        """(epoch, shard) of file `k` of the sequence of the files of all epochs."""
        epoch, place = divmod(k, self.shards)
        if epoch not in self._shard_orders:
            if (
                len(self._shard_orders) == 4
            ):  # enough: at any time the lanes are in at most two neighbouring epochs
                self._shard_orders.pop(min(self._shard_orders))
            self._shard_orders[epoch] = permutation(self.shards, self.seed, epoch)
        return epoch, int(self._shard_orders[epoch][place])

    def length(self, shard: int) -> int | None:
        """The number of records of a shard, if the stream knows it or it has been read to the end; else None."""
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
            self.new_lengths.append((name, length))
        self.lengths[name] = length

    def blocks(self, shard: int, start: int) -> Iterator[list[tuple[dict, str]]]:
        """Yield the blocks of a shard, lists of (record, name), from record `start` on, the first of its block."""
        records, at = self.stream.read(shard, start), start
        while block := list(islice(records, self.block_size)):
            yield [
                (record, record_name(record, f"image {at + i} of shard {shard}"))
                for i, record in enumerate(block)
            ]
            at += len(block)
        self.note_length(shard, at)

    def some_records(self, most: int) -> list[tuple[dict, str]]:
        """The first `most` records, or all if there are fewer, each with its name."""
        records = (
            record for shard in range(self.shards) for block in self.blocks(shard, 0) for record in block
        )
        return list(islice(records, most))


class Lane:
    """Lane `number` of a stream: files `number`, `number + L` ... in sequence, each opened when it is needed."""

    def __init__(self, stream: StreamedImages, number: int):
        self.stream = stream
        self.next_file = number  # in the sequence of the files of all epochs
        self.records_before = 0  # number of records of the lane in the files before the current one
        # The current block, and the position of its first record in the lane.
        self.first, self.block = 0, []
        # Blocks after the current one that were read for replacements, each with its position in the lane.
        self.later_blocks: deque[tuple[int, list[tuple[dict, str]]]] = deque()
        self.blocks = iter(())

    def records_from(self, position: int) -> Iterator[tuple[dict, str]]:
        """Yield the record at a position of the lane, then its replacements: its block, then later blocks.

        Positions must not decrease from call to call.
        """
        while position >= self.first + len(self.block):
            self.first, self.block = (
                self.later_blocks.popleft() if self.later_blocks else self._next_block(position)
            )
        at = position - self.first
        yield from self.block[at:]
        yield from self.block[:at]
        for later in count():
            if later == len(self.later_blocks):
                self.later_blocks.append(self._next_block(0))
            yield from self.later_blocks[later][1]

    def _next_block(self, position: int) -> tuple[int, list[tuple[dict, str]]]:
        """The position of the next block in the lane, and the block. Blocks before `position` may be skipped.

        Raises ValueError after many files in a row without a record.
        """
        empty = 0
        while True:
            found = next(self.blocks, None)
            if found is not None:
                return found
            self.blocks = self._open(position)
            empty += 1
            if empty > 100 * self.stream.shards:  # rather than search forever
                raise ValueError(f"data.train: {empty} files in a row without an image")

    def _open(self, position: int) -> Iterator[tuple[int, list[tuple[dict, str]]]]:
        """Yield the shuffled blocks of the lane's next file, none if it is known to end before `position`."""
        stream, (epoch, shard) = self.stream, self.stream.epoch_and_shard(self.next_file)
        length = stream.length(shard)
        self.next_file += stream.lanes
        if length is not None and position >= self.records_before + length:
            self.records_before += length
            return
        # A file of unknown length may end before the position, so it is read from its beginning.
        skipped = 0 if length is None else max(0, position - self.records_before) // stream.block_size
        at = skipped * stream.block_size
        for number, block in enumerate(stream.blocks(shard, at), skipped):
            order = permutation(len(block), stream.seed, epoch, shard, number)
            yield self.records_before + at, [block[i] for i in order]
            at += len(block)
        self.records_before += at
