"""Open a source of images by its name, as rows or as a stream of encoded images. No image is decoded here.

Rows are read by number: `len(rows)`, `rows[n]` -> {column: record, ...}, `rows.features`. A stream is read file by
file, see `file_streams.Stream`. A record is {"bytes": bytes or None, "path": str or None}, as of
`datasets.Image(decode=False)`; `encoded_file` opens it for reading.
"""

import io
import logging
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from .download import local_copies
from .file_streams import FileStream, HubStream, Stream
from .locating import HUB_ID, KINDS, locate
from .parquet_files import ParquetRows, mean_group_bytes, schema_of
from .remote import is_url
from .samples.tables import SampleRows
from .tar_files import TarRows, fields_of

LARGE_ROW_GROUP = 2**20  # bytes; parquet files with larger row groups are copied, to read single rows
# What an error message says of columns beside the image: which sources have them.
SOURCES_WITH_COLUMNS = "of parquet, webdataset, saved, hub and sample sources"
ANNOUNCED_BYTES = 2**30  # a source above this size is logged before it is indexed or copied

Rows = datasets.Dataset | TarRows | ParquetRows | SampleRows

log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """The options or configuration keys that name a source, its image column and the columns kept beside it.

    Error messages begin with them. `kept` is None where `column` is the key of all columns.
    """

    source: str
    column: str
    kept: str | None = None

    def of(self, name: str, column: str) -> str:
        """The key that column `name` was given by; `column` is the image column."""
        return self.column if name == column else self.kept or self.column


def open_source(
    source: str,
    keys: Keys,
    column: str = "image",
    split: str = "train",
    samples: Literal["train", "validation"] = "train",
    keep: Sequence[str] = (),
    in_order: bool = False,
) -> Rows:
    """Open a source to be read by row number; `locating.KINDS` lists what it may be.

    A row has the image column `column`, as a record of encoded bytes or a path, and the columns `keep`. `split`:
    the split of a hub data set or of a saved DatasetDict. `samples`: the split of the data sets that need no
    download. Local files are read where they are, except that parquet files with row groups above `LARGE_ROW_GROUP`
    bytes are copied first, unless rows are read `in_order`; remote files are downloaded. Both are logged first.
    Raises FileNotFoundError for a source that does not exist or cannot be reached, ValueError for one that cannot
    be used; messages name the key and the source.
    """
    kind, files = locate(source, keys.source, samples)
    if kind == "sample":
        return _sample_rows(source, keys, samples, column, keep)
    if kind == "images":
        if keep:
            raise ValueError(
                f"{keys.of(keep[0], column)}: {keep[0]!r}, but {source} is files; allowed: {SOURCES_WITH_COLUMNS}"
            )
        return _rows_of_files(files, column)
    if kind in ("saved", "hub"):
        opened = (
            _open_saved(files[0], keys.source, split)
            if kind == "saved"
            else _open_hub(source, keys.source, split)
        )
        return _select_encoded(opened, source, keys, column, keep)
    files = local_copies(files, keys.source)
    _check_columns(kind, files, source, keys, column, keep)
    return _read_or_explain(
        kind, files, source, keys, lambda: _open_rows(kind, files, source, keys, column, keep, in_order)
    )


def open_stream(
    source: str, keys: Keys, column: str = "image", split: str = "train", keep: Sequence[str] = ()
) -> Stream:
    """Open a parquet, webdataset or hub source to be read in sequence, file by file.

    With `keep`, records have these columns under "columns", beside the image's "bytes" and "path". Raises the
    errors of `open_source`, and ValueError for the other kinds of source.
    """
    kind, files = locate(source, keys.source)
    if kind in ("images", "saved", "sample"):
        raise ValueError(f"data.streaming: true, but {source} is read in place in any case; allowed: false")
    if kind == "hub":
        images = _open_hub(source, keys.source, split, streaming=True)
        return HubStream(_select_encoded(images, source, keys, column, keep), column, keep)
    _check_columns(kind, files, source, keys, column, keep)
    return FileStream(kind, files, column, keep)


def _check_columns(
    kind: str, files: Sequence[str], source: str, keys: Keys, column: str, keep: Sequence[str] = ()
) -> None:
    """Check the columns of the first file: all are there, and in parquet `column` holds images.

    Raises ValueError for columns, and ValueError or FileNotFoundError for a file that cannot be read.
    """
    read_columns = fields_of if kind == "webdataset" else schema_of
    found = _read_or_explain(kind, files, source, keys, lambda: read_columns(files[0]))
    for name in (column, *keep):
        if name not in found:
            raise ValueError(
                f"{keys.of(name, column)}: no column {name!r} in {source}; allowed: {', '.join(found)}"
            )
    if kind == "parquet":
        _check_holds_images(found[column], source, keys, column)


def _read_or_explain(kind: str, files: Sequence[str], source: str, keys: Keys, read: Callable):
    """Return `read()`, its errors as a one-line FileNotFoundError or ValueError that names key and source."""
    try:
        return read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{keys.source}: {source}: no such file ({error})") from error
    except Exception as error:  # those of pyarrow, tarfile, datasets and each protocol have no common base
        raise ValueError(
            f"{keys.source}: {source} cannot be read as {kind} files ({_root_cause(error)})"
        ) from error


def _open_rows(
    kind: str, files: list[str], source: str, keys: Keys, column: str, keep: Sequence[str], in_order: bool
) -> Rows:
    """Open local tar or parquet files by row number, with a warning first if that takes long."""
    size = sum(map(os.path.getsize, files))
    if kind == "webdataset":
        if size > ANNOUNCED_BYTES:
            log.warning(
                "%s: finding the images in %d tar files of %s", keys.source, len(files), _gigabytes(size)
            )
        return TarRows(files, column, keep)
    group = mean_group_bytes(files, column)
    if in_order or group <= LARGE_ROW_GROUP:
        return ParquetRows(files, column, keep)
    if size > ANNOUNCED_BYTES:
        log.warning(
            "%s: a row of %s can only be read with the %.0f MB of its row group, so the files are copied first, "
            "once: %s in %s; data.streaming=true reads them as they are",
            keys.source, source, group / 1e6, _gigabytes(size), datasets.config.HF_DATASETS_CACHE,
        )  # fmt: skip
    copied = datasets.load_dataset("parquet", data_files=files, split="train")
    return _select_encoded(copied, source, keys, column, keep)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def encoded_file(record: dict | None, name: str) -> io.BytesIO:
    """The encoded bytes of a record as a file whose `name` is `name`.

    Raises ValueError if the record has no image, OSError if its path cannot be read.
    """
    record = record or {}
    data = record.get("bytes")
    if data is None:
        if record.get("path") is None:
            raise ValueError(f"{name}: no image in this row")
        path = record["path"]
        with fsspec.open(path, "rb") if is_url(path) else open(path, "rb") as file:
            data = file.read()
    file = io.BytesIO(data)
    file.name = name
    return file


def record_name(record: dict | None, place: str) -> str:
    """The name of a record for messages: "PATH (PLACE)", or its place in the source alone if it has no path."""
    path = (record or {}).get("path")
    return f"{path} ({place})" if path else place


def image_keys(images: Rows, column: str, source: str, most_read: int | None = None) -> list[bytes]:
    """A key that identifies each image, the same after the source has been moved: from its path or its contents.

    From a path: the part below the folder `source`, or the name of a file elsewhere. Without a path: the length of
    the encoded bytes and the last KiB of them, the end of the compressed pixels. `most_read`: if some image has no
    path, only so many images, spread evenly, get a key.
    """
    folder = os.path.join(os.path.expanduser(source), "")
    names = image_names(images, column)
    rows = range(len(names))
    if most_read is not None and None in names:
        rows = np.unique(np.linspace(0, len(names) - 1, most_read).astype(int)).tolist()
    keys = []
    for row in rows:
        if names[row] is None:
            data = (images[row][column] or {}).get("bytes") or b""
            keys.append(b"%d " % len(data) + data[-1024:])
        else:
            name = names[row].removeprefix(folder)
            keys.append((os.path.basename(name) if os.path.isabs(name) else name).encode())
    return keys


def image_names(images: Rows, column: str) -> list[str | None]:
    """The path of each row's image, None where it has none; the images themselves are not read."""
    if isinstance(images, datasets.Dataset):
        return pc.struct_field(images.with_format("arrow")[:].column(column), "path").to_pylist()
    return images.image_names()


def column_values(images: Rows, name: str) -> list:
    """All values of a column that was kept beside the images (`keep`); the images are not read."""
    if isinstance(images, datasets.Dataset):
        return images.select_columns(name).with_format("arrow")[:].column(name).to_pylist()
    return images.values(name)


def _sample_rows(
    source: str, keys: Keys, samples: Literal["train", "validation"], column: str, keep: Sequence[str]
) -> SampleRows:
    rows = SampleRows(source, samples, column, keep)
    for name in keep:
        if name not in rows.columns:
            known = ", ".join(rows.columns) or "none"
            raise ValueError(f"{keys.of(name, column)}: no column {name!r} in {source}; allowed: {known}")
    return rows


def _rows_of_files(paths: Sequence[str], column: str) -> datasets.Dataset:
    features = datasets.Features({column: datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({column: list(paths)}, features=features)


def _open_saved(path: str, key: str, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:
        raise ValueError(
            f"{key}: {path} was written by save_to_disk but cannot be read ({_root_cause(error)})"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{key}: no split {split!r} in {path}; allowed: {', '.join(saved)}")
        saved = saved[split]
    return saved


def _open_hub(
    source: str, key: str, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    name, config, revision = HUB_ID.fullmatch(source).group("name", "config", "revision")
    missing = f"{key}: {source!r} is no file or folder here"
    try:
        # For a name that does not exist, load_dataset would retry for half a minute.
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except OfflineModeIsEnabled:
        pass  # load_dataset can still find it in the cache
    except Exception as error:  # the base class of the client's errors differs between its versions
        raise FileNotFoundError(
            f"{missing}, and no data set of that name could be reached on the hub ({_root_cause(error)}); "
            f"allowed: {KINDS}"
        ) from error
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        raise FileNotFoundError(
            f"{missing}, and split {split!r} of the data set on the hub cannot be loaded ({_root_cause(error)})"
        ) from error
    return loaded


def _select_encoded(images, source: str, keys: Keys, column: str, keep: Sequence[str] = ()):
    """Select `column`, undecoded, and the columns `keep` of a data set.

    `datasets` would otherwise decode whole images in the main process. Raises ValueError for a column that is
    missing and for an image column that holds no images.
    """
    columns = images.column_names or []
    for name in (column, *keep):
        if name not in columns:
            raise ValueError(
                f"{keys.of(name, column)}: no column {name!r} in {source}; allowed: {', '.join(columns)}"
            )
    _check_holds_images(images.features[column], source, keys, column)
    return images.select_columns([column, *keep]).cast_column(column, datasets.Image(decode=False))


def _check_holds_images(
    kind: datasets.features.features.FeatureType, source: str, keys: Keys, column: str
) -> None:
    """Raise ValueError unless a column's type is an image, a struct with bytes, encoded bytes or a path."""
    encoded = (
        "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "string")
    )
    if not encoded and not isinstance(kind, datasets.Image):
        raise ValueError(f"{keys.column}: column {column!r} of {source} holds {kind}, not images")


def _root_cause(error: BaseException) -> str:
    """Type and first line of the error at the start of a chain (`__cause__`)."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
