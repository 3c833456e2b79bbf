"""Read webdataset shards (tar files; neighbours with one base name are a sample) in sequence or by number."""

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

NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # the sample, and from the first dot on the field
LOOKED_AT = 5  # first samples, whose fields are taken for those of all samples


def members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (sample, field, member) for each file in an archive; read its content before asking for the next."""
    for member in archive:
        archive.members = []  # else tarfile keeps every header that it has read
        match = NAME.fullmatch(member.name) if member.isfile() else None
        if match is not None:
            yield match[1], match[2], member


def fields_of(path: str) -> list[str]:
    """The fields of the first samples, in order of appearance."""
    with open_file(path) as file, tarfile.open(fileobj=file, mode=_mode(file)) as archive:
        first = islice(groupby(members(archive), itemgetter(0)), LOOKED_AT)
        return list(dict.fromkeys(field for _, sample in first for _, field, _ in sample))


def read_tar(path: str, field: str, start: int = 0, keep: Sequence[str] = ()) -> Iterator[dict | None]:
    """The records {"bytes", "path"} of a field from sample `start` on, None for a sample without it.

    With {"columns": the fields `keep`, decoded} beside them. Before `start` only headers are read, if the file is
    seekable.
    """
    with open_file(path) as file, tarfile.open(fileobj=file, mode=_mode(file)) as archive:
        for n, (_, sample) in enumerate(groupby(members(archive), itemgetter(0))):
            if n >= start:
                record, columns = None, dict.fromkeys(keep)
                for _, name, member in sample:
                    if name == field:
                        record = {"bytes": archive.extractfile(member).read(), "path": member.name}
                    elif name in columns:
                        columns[name] = _decoded(name, archive.extractfile(member).read())
                yield {**record, "columns": columns} if record and keep else record


def _decoded(name: str, data: bytes) -> Any:
    """A field's value as `datasets` decodes it by the end of its name; the bytes where it has no decoder."""
    decode = WebDataset.DECODERS.get(name.rsplit(".", 1)[-1].lower())
    return decode(data) if decode else data


def _mode(file) -> str:
    return "r:" if file.seekable() else "r|"


class TarRows:
    """The samples of local tar files by number, without a copy: an index of offsets is made when it is opened.

    `rows[n]` -> {field: value}: `column` as a record {"bytes", "path"}, the fields `keep` decoded as `datasets`
    does (text, numbers, JSON, arrays). The index holds 16 bytes a field, and the names.
    """

    def __init__(self, paths: Sequence[str], column: str, keep: Sequence[str] = ()):
        self.paths, self.fields = list(paths), (column, *keep)
        files, places, names = array("i"), array("q"), []
        for number, path in enumerate(self.paths):
            with tarfile.open(path, mode="r:") as archive:
                for _, sample in groupby(members(archive), itemgetter(0)):
                    found = {field: member for _, field, member in sample}
                    for name in self.fields:
                        member = found.get(name)
                        places.extend((member.offset_data, member.size) if member else (-1, 0))
                    names.append(found[column].name if column in found else None)
                    files.append(number)
        self.files = np.frombuffer(files, np.int32) if files else np.zeros(0, np.int32)
        self.places = np.array(places, np.int64).reshape(len(files), len(self.fields), 2)
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
        """A whole field that is kept beside the images; these are not read for it."""
        return [self._read(row, [name])[name] for row in range(len(self))]

    def _read(self, row: int, fields: Sequence[str]) -> dict[str, Any]:
        """The bytes of the image and the decoded values of other fields, None where the sample has none."""
        values = {}
        with open(self.paths[self.files[row]], "rb") as file:
            for name in fields:
                offset, size = self.places[row, self.fields.index(name)].tolist()
                file.seek(max(offset, 0))
                data = file.read(size) if offset >= 0 else None
                values[name] = data if data is None or name == self.fields[0] else _decoded(name, data)
        return values

    def image_names(self) -> list[str | None]:
        """The name of each row's image, None where a sample has none."""
        return self.names.to_pylist()

    @property
    def features(self) -> datasets.Features:
        """Types of the columns; of those to keep, as the first samples have them."""
        column, *keep = self.fields
        first = [self[row] for row in range(min(len(self), LOOKED_AT))]
        types = pa.schema([(name, pa.array([row[name] for row in first]).type) for name in keep])
        return datasets.Features(
            {column: datasets.Image(decode=False), **datasets.Features.from_arrow_schema(types)}
        )
