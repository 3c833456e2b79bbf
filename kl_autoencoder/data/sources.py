"""Where photographs come from: the name of a source -> a `datasets` data set of images that are not decoded yet.

Everything here runs in the main process and looks at no pixel. A record is {"bytes": ... or None, "path": ...
or None}, as `datasets.Image(decode=False)` gives it; `encoded_file` makes a file of one.
"""

import io
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from .locating import KINDS, locate

Images = datasets.Dataset | datasets.IterableDataset


class Keys(NamedTuple):
    """What the user calls a source and its image column: the names that errors begin with."""

    source: str
    column: str


def open_source(
    source: str,
    keys: Keys,
    column: str = "image",
    split: str = "train",
    streaming: bool = False,
    samples: Literal["train", "validation"] = "train",
    keep: Sequence[str] = (),
) -> Images:
    """Open a source; see `KINDS`. The result has the column `column`, cast to Image(decode=False), and `keep`.

    `split` matters where splits have names: on the hub and in a saved DatasetDict. `streaming` reads parquet,
    webdataset and hub sources in sequence instead of converting them to Arrow files on this disk first; other
    kinds are read in place and come as a `datasets.Dataset` in any case. `samples` says which half of the sample
    photographs is meant. Raises FileNotFoundError for a source that is not there or cannot be reached,
    ValueError for one that cannot be used; both name the key and the source.
    """
    kind, files = locate(source, keys.source, samples)
    if kind == "images":
        images = _image_files(files, column)
    elif kind == "saved":
        images = _open_saved(files[0], keys.source, split)
    elif kind == "hub":
        images = _open_hub(source, keys.source, split, streaming)
    else:
        images = _open_tables(kind, files, source, keys.source, streaming)
    return _encoded(images, source, keys, column, keep)


def encoded_file(record: dict | None, name: str) -> io.BytesIO:
    """The bytes of a record as a file called `name`. Raises ValueError if it has none, OSError if unreadable."""
    record = record or {}
    data = record.get("bytes")
    if data is None:
        if record.get("path") is None:
            raise ValueError(f"{name}: no image in this row")
        with fsspec.open(record["path"], "rb") as file:
            data = file.read()
    file = io.BytesIO(data)
    file.name = name
    return file


def record_name(record: dict | None, place: str) -> str:
    """What to call a record in a message: its path where there is one, with its place in the source."""
    path = (record or {}).get("path")
    return f"{path} ({place})" if path else place


def image_keys(
    images: datasets.Dataset, column: str, source: str, most_read: int | None = None
) -> list[bytes]:
    """What each image is told from the others by: its path, within `source` if that is a folder, or its contents.

    Of contents the length and the last KiB, which is the end of the compressed pixels. `most_read`: where images
    have no paths, only so many are looked at, spread evenly.
    """
    folder = os.path.join(os.path.expanduser(source), "")
    structs = images.with_format("arrow")[:].column(column)
    paths = pc.struct_field(structs, "path").to_pylist()
    if most_read is not None and None in paths:
        rows = np.unique(np.linspace(0, len(images) - 1, most_read).astype(int)) if len(images) else []
        structs, paths = structs.take(pa.array(rows, pa.int64())), [paths[row] for row in rows]
    contents = pc.struct_field(structs, "bytes")
    keys = []
    for row, path in enumerate(paths):
        if path is not None:
            name = path.removeprefix(folder)
            keys.append((os.path.basename(name) if os.path.isabs(name) else name).encode())
        else:
            data = contents[row].as_buffer()  # not copied
            keys.append(b"" if data is None else b"%d " % data.size + data[-1024:].to_pybytes())
    return keys


def _image_files(paths: Sequence[str], column: str) -> datasets.Dataset:
    features = datasets.Features({column: datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({column: list(paths)}, features=features)


def _open_saved(path: str, key: str, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:
        raise ValueError(
            f"{key}: {path} was written by save_to_disk but cannot be read ({_cause(error)})"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{key}: no split {split!r} in {path}; allowed: {', '.join(saved)}")
        saved = saved[split]
    return saved


def _open_tables(builder: str, files: list[str], source: str, key: str, streaming: bool) -> Images:
    try:
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming)
    except Exception as error:  # pyarrow's, tarfile's, datasets' own: no common base
        raise ValueError(f"{key}: {source} cannot be read as {builder} files ({_cause(error)})") from error


def _open_hub(source: str, key: str, split: str, streaming: bool) -> Images:
    missing = f"{key}: {source!r} is no file or folder here"
    try:
        # load_dataset would ask again and again, for half a minute, before it says that a name leads nowhere.
        HfApi().dataset_info(source, timeout=10)
    except OfflineModeIsEnabled:
        pass  # load_dataset finds what is in the cache
    except Exception as error:  # the hub client's errors have changed their base with its versions
        raise FileNotFoundError(
            f"{missing}, and no data set of that name could be reached on the hub ({_cause(error)}); "
            f"allowed: {KINDS}"
        ) from error
    try:
        loaded = datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception as error:
        raise FileNotFoundError(
            f"{missing}, and split {split!r} of the data set on the hub cannot be loaded ({_cause(error)})"
        ) from error
    return loaded


def _encoded(images: Images, source: str, keys: Keys, column: str, keep: Sequence[str]) -> Images:
    """Keep the image column, as encoded bytes: datasets would decode whole pictures in the main process."""
    columns = images.column_names or []
    for name in (column, *keep):
        if name not in columns:
            raise ValueError(f"{keys.column}: no column {name!r} in {source}; allowed: {', '.join(columns)}")
    kind = images.features[column]
    # A struct of bytes or a path, encoded bytes, or a path.
    encoded = (
        "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "string")
    )
    if not encoded and not isinstance(kind, datasets.Image):
        raise ValueError(f"{keys.column}: column {column!r} of {source} holds {kind}, not images")
    return images.select_columns([column, *keep]).cast_column(column, datasets.Image(decode=False))


def _cause(error: BaseException) -> str:
    """The first line of the error that started a chain of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
