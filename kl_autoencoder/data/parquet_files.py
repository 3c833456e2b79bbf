"""Read parquet files: rows in sequence, or rows of local files by number (memory-mapped, without a copy)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .remote import is_url, open_file


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a parquet file: a local one memory-mapped, a URL through fsspec."""
    return pq.ParquetFile(path, memory_map=True) if not is_url(path) else pq.ParquetFile(open_file(path))


def schema_of(path: str) -> datasets.Features:
    """The columns of a file and their types."""
    with open_parquet(path) as file:
        return datasets.Features.from_arrow_schema(file.schema_arrow)


def read_parquet(path: str, column: str, start: int = 0, keep: Sequence[str] = ()) -> Iterator[dict | None]:
    """Yield the records {"bytes", "path"} of an image column from row `start` on; None for a row without an image.

    With `keep`, a record also has {"columns": {name: value}} of these columns. Row groups that end before `start`
    are not read.
    """
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < rows:
                table = _read_group(file, group, [column, *keep])
                values, kept = table.column(column), [(name, table.column(name)) for name in keep]
                for row in range(start, rows):
                    yield as_record(values[row].as_py(), {name: other[row].as_py() for name, other in kept})
            start = max(start - rows, 0)


def read_column(path: str, name: str) -> list[Any]:
    """All values of a column; the other columns are not read."""
    with open_parquet(path) as file:
        return file.read(columns=[name], use_threads=False).column(name).to_pylist()


def row_count(path: str) -> int:
    """The number of rows of a file, from its footer."""
    with open_parquet(path) as file:
        return file.metadata.num_rows


def mean_group_bytes(paths: Sequence[str], column: str) -> float:
    """Mean size in bytes of `column` in a row group, uncompressed: what has to be read for a single row."""
    sizes = []
    for path in paths:
        with open_parquet(path) as file:
            for group in range(file.num_row_groups):
                chunks = file.metadata.row_group(group)
                sizes.append(
                    sum(
                        chunks.column(i).total_uncompressed_size
                        for i in range(chunks.num_columns)
                        if chunks.column(i).path_in_schema.split(".")[0] == column
                    )
                )
    return sum(sizes) / max(len(sizes), 1)


def as_record(value: Any, kept: Mapping[str, Any] | None = None) -> dict | None:
    """Convert a value of an image column to a record {"bytes", "path"}; None where there is no image.

    The value is a struct of bytes and path, encoded bytes, or a path. With `kept`, the record also has
    {"columns": kept}.
    """
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    elif isinstance(value, str):
        value = {"bytes": None, "path": value}
    return {**value, "columns": kept} if value and kept else value


class ParquetRows:
    """The rows of local parquet files by number, without a copy: `rows[n]` -> {name: value}.

    The value of `column` is a record {"bytes", "path"}; the columns `keep` are as stored. A row costs reading its
    whole row group; the last group stays in memory, so that reading rows in sequence reads each group once. Raises
    IndexError for a row out of range.
    """

    def __init__(self, paths: Sequence[str], column: str, keep: Sequence[str] = ()):
        self.paths, self.fields = list(paths), [column, *keep]
        self.groups: list[
            tuple[int, int, int]
        ] = []  # (number of the file, of the group in it, rows of the group)
        for number, path in enumerate(self.paths):
            with open_parquet(path) as file:
                metadata = file.metadata
            self.groups += [
                (number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)
            ]
        # first row of each group, then the end
        self.starts = np.cumsum([0, *(rows for _, _, rows in self.groups)])
        self._last: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        table = self._group(group)
        values = {name: table.column(name)[row - int(self.starts[group])].as_py() for name in self.fields}
        column = self.fields[0]
        return values | {column: as_record(values[column])}

    def _group(self, group: int) -> pa.Table:
        if self._last is None or self._last[0] != group:
            file_number, group_in_file, _ = self.groups[group]
            with open_parquet(self.paths[file_number]) as file:
                self._last = group, _read_group(file, group_in_file, self.fields)
        return self._last[1]

    def image_names(self) -> list[str | None]:
        """The path of each row's image, None where it has none; the images themselves are not read."""
        column, names = self.fields[0], []
        for path in self.paths:
            with open_parquet(path) as file:
                kind = file.schema_arrow.field(column).type
                if pa.types.is_struct(kind):
                    paths = (
                        file.read(columns=[f"{column}.path"], use_threads=False)
                        .column(column)
                        .combine_chunks()
                    )
                    names += pa.array(paths).field("path").to_pylist() if len(paths) else []
                elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
                    names += file.read(columns=[column], use_threads=False).column(column).to_pylist()
                else:
                    names += [None] * file.metadata.num_rows
        return names

    def values(self, name: str) -> list[Any]:
        """All values of a column."""
        return [value for path in self.paths for value in read_column(path, name)]

    @property
    def features(self) -> datasets.Features:
        features = schema_of(self.paths[0])
        column, *keep = self.fields
        return datasets.Features(
            {column: datasets.Image(decode=False), **{name: features[name] for name in keep}}
        )


def _read_group(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    # A forked worker does not inherit the threads of pyarrow's pool: reading with them would wait forever.
    return file.read_row_group(group, columns=list(columns), use_threads=False)
