"""Read webdataset shards, in sequence or by sample number.

A shard is a tar file; neighbouring members `SAMPLE.FIELD` with the same SAMPLE are the fields of one sample.
"""

import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .remote import open_file

SAMPLE_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # split at the first dot of the file's name
FIRST_SAMPLES = 5  # how many samples are looked at for the fields and types of all


def members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (sample, field, member) for each file of an archive; a member must be read before the next is taken."""
    for member in archive:
        archive.members = []  # tarfile would keep every header that it has read
        match = SAMPLE_AND_FIELD.fullmatch(member.name) if member.isfile() else None
        if match is not None:
            yield match[1], match[2], member


def fields_of(path: str) -> list[str]:
    """The fields of the first `FIRST_SAMPLES` samples of a file, in order of appearance."""
    with open_file(path) as file, tarfile.open(fileobj=file, mode=_tar_mode(file)) as archive:
        first = islice(groupby(members(archive), itemgetter(0)), FIRST_SAMPLES)
        return list(dict.fromkeys(field for _, sample in first for _, field, _ in sample))


def read_tar(path: str, field: str, start: int = 0, keep: Sequence[str] = ()) -> Iterator[dict | None]:
    """Yield the records {"bytes", "path"} of an image field from sample `start` on; None for a sample without it.

    With `keep`, a record also has {"columns": {name: value}} of these fields, decoded, None where a sample lacks
    one. In a seekable file only the headers of samples before `start` are read.
    """
    with open_file(path) as file, tarfile.open(fileobj=file, mode=_tar_mode(file)) as archive:
        for n, (_, sample) in enumerate(groupby(members(archive), itemgetter(0))):
            if n >= start:
                record, columns = None, dict.fromkeys(keep)
                for _, name, member in sample:
                    if name == field:
                        record = {"bytes": archive.extractfile(member).read(), "path": member.name}
                    elif name in columns:
                        columns[name] = _decode(name, archive.extractfile(member).read())
                yield {**record, "columns": columns} if record and keep else record


def _decode(name: str, data: bytes) -> Any:
    """Decode a field by the suffix of its name, as `datasets` does; other suffixes leave the bytes as they are."""
    decode = WebDataset.DECODERS.get(name.rsplit(".", 1)[-1].lower())
    return decode(data) if decode else data


def _tar_mode(file) -> str:
    """tarfile's mode: random access if the file can seek, else a stream that is read once."""
    return "r:" if file.seekable() else "r|"


class TarRows:
    """The samples of local tar files by number, without a copy: `rows[n]` -> {field: value}.

    The value of `column` is a record {"bytes", "path"}; the fields `keep` are decoded as `datasets` does (text,
    numbers, JSON, arrays); a field that a sample lacks is None. Opening reads all headers and builds an index: the
    offset and size of each field (16 bytes), and the names of the images.
    """

    def __init__(self, paths: Sequence[str], column: str, keep: Sequence[str] = ()):
        self.paths, self.fields = list(paths), (column, *keep)
        files, extents, names = array("i"), array("q"), []
        for number, path in enumerate(self.paths):
            with tarfile.open(path, mode="r:") as archive:
                for _, sample in groupby(members(archive), itemgetter(0)):
                    found = {field: member for _, field, member in sample}
                    for name in self.fields:
                        member = found.get(name)
                        extents.extend((member.offset_data, member.size) if member else (-1, 0))
                    names.append(found[column].name if column in found else None)
                    files.append(number)
        self.files = np.frombuffer(files, np.int32) if files else np.zeros(0, np.int32)
        # (samples, fields, 2): offset and size in bytes of each field; offset -1 where a sample lacks it.
        self.extents = np.array(extents, np.int64).reshape(len(files), len(self.fields), 2)
        self.names = pa.array(names, pa.string())  # one buffer, which forked workers share

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self._read(row, self.fields)
        column = self.fields[0]
        if values[column] is not None:
            values[column] = {"bytes": values[column], "path": self.names[row].as_py()}
        return values

    def values(self, name: str) -> list[Any]:
        """All values of a field; the images are not read."""
        return [self._read(row, [name])[name] for row in range(len(self))]

    def _read(self, row: int, fields: Sequence[str]) -> dict[str, Any]:
        """The image's bytes and the decoded values of the other fields; None where the sample lacks a field."""
        values = {}
        with open(self.paths[self.files[row]], "rb") as file:
            for name in fields:
                offset, size = self.extents[row, self.fields.index(name)].tolist()
                file.seek(max(offset, 0))
                data = file.read(size) if offset >= 0 else None
                values[name] = data if data is None or name == self.fields[0] else _decode(name, data)
        return values

    def image_names(self) -> list[str | None]:
        """The member name of each row's image, None where a sample has none."""
        return self.names.to_pylist()

    @property
    def features(self) -> datasets.Features:
        """Types of the columns; those of the kept fields are inferred from the first `FIRST_SAMPLES` samples."""
        column, *keep = self.fields
        first = [self[row] for row in range(min(len(self), FIRST_SAMPLES))]
        types = pa.schema([(name, pa.array([row[name] for row in first]).type) for name in keep])
        return datasets.Features(
            {column: datasets.Image(decode=False), **datasets.Features.from_arrow_schema(types)}
        )
