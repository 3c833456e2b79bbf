"""Sources that are read in sequence: a number of files (shards), each a sequence of records."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import datasets

from .parquet_files import as_record, read_column, read_parquet, rows_in
from .remote import is_url, read_with_retries, size_of
from .tar_files import read_tar

BATCH = 16  # records of a hub data set that are read at a time


class Stream(Protocol):
    """A source that `open_stream` opened: `num_shards` shards (files), each a sequence of records."""

    num_shards: int

    def name(self, shard: int) -> str:
        """A name that tells a shard from the others, the same in every run."""

    def read(self, shard: int, start: int = 0) -> Iterator[dict | None]:
        """The records {"bytes", "path"} of a shard from number `start` on; None for a record without an image.

        Where columns are kept beside the image, {"columns": {name: value}} is in the record, too.
        """

    def length(self, shard: int) -> int | None:
        """The number of records of a shard; None where it can only be found by reading the shard."""

    def size(self, shard: int) -> int | None:
        """The bytes of a shard; None where only a request to a server would tell."""

    def values(self, name: str) -> list | None:
        """A whole column that is kept beside the images; None where all images would have to be read for it."""


class FileStream:
    """Tar or parquet files, local or remote. Reading goes on where a remote file failed."""

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
        return rows_in(path) if self.kind == "parquet" and not is_url(path) else None

    def size(self, shard: int) -> int | None:
        path = self.paths[shard]
        # each URL would take a request, and there may be thousands of files
        return None if is_url(path) else size_of(path)

    def values(self, name: str) -> list | None:
        if self.kind == "webdataset":
            return None
        return [value for path in self.paths for value in read_column(path, name)]


class HubStream:
    """A data set of the hub, as `datasets` streams it."""

    def __init__(self, images: datasets.IterableDataset, column: str, keep: Sequence[str] = ()):
        self.images, self.column, self.num_shards = images, column, images.num_shards
        self.keep = tuple(keep)

    def name(self, shard: int) -> str:
        return str(shard)

    def read(self, shard: int, start: int = 0) -> Iterator[dict | None]:
        # iter(), because a plain loop would divide the shard's records among the loader's workers
        batches = self.images.shard(num_shards=self.num_shards, index=shard).iter(BATCH)
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
