"""Sources that are read in sequence: a list of files (shards), each a sequence of records."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import datasets

from .parquet_files import as_record, read_column, read_parquet, row_count
from .remote import is_url, read_with_retries, size_of
from .tar_files import read_tar

HUB_BATCH = 16  # records that are read at a time from a hub data set


class Stream(Protocol):
    """A source opened by `open_stream`: shards (files) 0 ... `num_shards` - 1, each a sequence of records."""

    num_shards: int

    def name(self, shard: int) -> str:
        """A name that identifies a shard, the same in every run."""

    def read(self, shard: int, start: int = 0) -> Iterator[dict | None]:
        """Yield the records {"bytes", "path"} of a shard from number `start` on; None for one without an image.

        If columns are kept beside the image, a record also has {"columns": {name: value}}. Raises OSError for a
        file that cannot be read.
        """

    def length(self, shard: int) -> int | None:
        """The number of records of a shard; None if finding out would take reading the whole shard."""

    def size(self, shard: int) -> int | None:
        """The size of a shard in bytes; None if finding out would take a request to a server."""

    def values(self, name: str) -> list | None:
        """All values of a kept column; None if finding them out would take reading all images."""


class FileStream:
    """A `Stream` of parquet or tar files, local or remote; `kind` is "parquet" or "webdataset".

    If reading a remote file fails, it is opened again and read on from the next record (`read_with_retries`).
    `column`: the image column; `keep`: other columns that records have under "columns". Reading raises OSError, one
    line that names the file.
    """

    def __init__(self, kind: str, paths: Sequence[str], column: str, keep: Sequence[str] = ()):
        self.kind, self.paths, self.column, self.keep = kind, list(paths), column, tuple(keep)
        self.num_shards = len(self.paths)

    def name(self, shard: int) -> str:
        return self.paths[shard]

    def read(self, shard: int, start: int = 0) -> Iterator[dict | None]:
        path = self.paths[shard]
        return read_with_retries(lambda n: self._read(path, n), path, start, lambda k: time.sleep(0.5 * 2**k))

    def _read(self, path: str, start: int) -> Iterator[dict | None]:
        read = read_tar if self.kind == "webdataset" else read_parquet
        return read(path, self.column, start, self.keep)

    def length(self, shard: int) -> int | None:
        path = self.paths[shard]
        return row_count(path) if self.kind == "parquet" and not is_url(path) else None

    def size(self, shard: int) -> int | None:
        path = self.paths[shard]
        # A URL would take a request, and there may be thousands of files.
        return None if is_url(path) else size_of(path)

    def values(self, name: str) -> list | None:
        if self.kind == "webdataset":
            return None
        return [value for path in self.paths for value in read_column(path, name)]


class HubStream:
    """A `Stream` of a hub data set, read through `datasets`; its lengths, sizes and values are unknown."""

    def __init__(self, images: datasets.IterableDataset, column: str, keep: Sequence[str] = ()):
        self.images, self.column, self.num_shards = images, column, images.num_shards
        self.keep = tuple(keep)

    def name(self, shard: int) -> str:
        return str(shard)

    def read(self, shard: int, start: int = 0) -> Iterator[dict | None]:
        # Not a plain loop: inside a DataLoader worker it would yield only that worker's share of the shard.
        batches = self.images.shard(num_shards=self.num_shards, index=shard).iter(HUB_BATCH)
        rows = (
            row
            for batch in batches
            for row in zip(*(batch[name] for name in (self.column, *self.keep)), strict=True)
        )
        records = (as_record(value, dict(zip(self.keep, kept, strict=True))) for value, *kept in rows)
        return islice(records, start, None)

    def length(self, shard: int) -> int | None:
        return None

    def size(self, shard: int) -> int | None:
        return None

    def values(self, name: str) -> list | None:
        return None
