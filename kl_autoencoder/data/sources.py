"""Open a source of images by its name: as rows, or as a stream, of encoded images. Nothing is decoded here.

Rows are read by number: `len(rows)`, `rows[n]` -> {column: record, ...}, `rows.features`; a stream is read file by
file, see `file_streams.Stream`. A record is {"bytes": ... or None, "path": ... or None}, as
`datasets.Image(decode=False)` gives it; `encoded_file` makes a file of one.
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
from .parquet_files import ParquetRows, bytes_of_groups, schema_of
from .remote import is_url
from .samples.tables import SampleRows
from .tar_files import TarRows, fields_of

LARGE_GROUP = 2**20  # bytes of images in a parquet row group above which single rows are read from a copy
TABLES = "of parquet, webdataset, saved, hub and sample sources"  # that have columns beside the image
ANNOUNCED_BYTES = 2**30  # bytes of a source that are read or written before anything else can start

Rows = datasets.Dataset | TarRows | ParquetRows | SampleRows

log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """The options or configuration keys that name a source, its image column and its other columns.

    Error messages begin with them. `kept` is left out where one key names all columns.
    """

    source: str
    column: str
    kept: str | None = None

    def of(self, name: str, column: str) -> str:
        """The key that names column `name`, where `column` is that of the images."""
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
    """Open a source to be read by number; see `KINDS`. Its rows have `column`, encoded, and the columns `keep`.

    `split` matters where splits have names: on the hub and in a saved DatasetDict. `samples`: which split of the
    sample photographs is meant. Local files are read where they are, except that parquet files with row groups
    above `LARGE_GROUP` bytes are copied first, unless they are read `in_order`; remote files are downloaded. Both
    are logged before. Raises FileNotFoundError for a source that is not there or cannot be reached, ValueError for
    one that cannot be used; both name the key and the source.
    """
    kind, files = locate(source, keys.source, samples)
    if kind == "sample":
        return _sample_rows(source, keys, samples, column, keep)
    if kind == "images":
        if keep:
            raise ValueError(
                f"{keys.of(keep[0], column)}: {keep[0]!r}, but {source} is files; allowed: {TABLES}"
            )
        return _image_files(files, column)
    if kind in ("saved", "hub"):
        opened = (
            _open_saved(files[0], keys.source, split)
            if kind == "saved"
            else _open_hub(source, keys.source, split)
        )
        return _encoded(opened, source, keys, column, keep)
    files = local_copies(files, keys.source)
    _check_columns(kind, files, source, keys, column, keep)
    return _read_as(
        kind, files, source, keys, lambda: _open_rows(kind, files, source, keys, column, keep, in_order)
    )


def open_stream(
    source: str, keys: Keys, column: str = "image", split: str = "train", keep: Sequence[str] = ()
) -> Stream:
    """Open parquet, webdataset or hub sources to be read file by file; raises as `open_source`.

    Its records have the columns `keep` beside the image's "bytes" and "path".
    """
    kind, files = locate(source, keys.source)
    if kind in ("images", "saved", "sample"):
        raise ValueError(f"data.streaming: true, but {source} is read in place in any case; allowed: false")
    if kind == "hub":
        images = _open_hub(source, keys.source, split, streaming=True)
        return HubStream(_encoded(images, source, keys, column, keep), column, keep)
    _check_columns(kind, files, source, keys, column, keep)
    return FileStream(kind, files, column, keep)


def _check_columns(
    kind: str, files: Sequence[str], source: str, keys: Keys, column: str, keep: Sequence[str] = ()
) -> None:
    """Raise for files that cannot be read, and for columns that the first file lacks."""
    look = fields_of if kind == "webdataset" else schema_of
    found = _read_as(kind, files, source, keys, lambda: look(files[0]))
    for name in (column, *keep):
        if name not in found:
            raise ValueError(
                f"{keys.of(name, column)}: no column {name!r} in {source}; allowed: {', '.join(found)}"
            )
    if kind == "parquet":
        _check_kind(found[column], source, keys, column)


def _read_as(kind: str, files: Sequence[str], source: str, keys: Keys, read: Callable):
    """read(), whose errors become one line that names the key and the source."""
    try:
        return read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{keys.source}: {source}: no such file ({error})") from error
    except Exception as error:  # pyarrow's, tarfile's, datasets' own, of each protocol: no common base
        raise ValueError(
            f"{keys.source}: {source} cannot be read as {kind} files ({_cause(error)})"
        ) from error


def _open_rows(
    kind: str, files: list[str], source: str, keys: Keys, column: str, keep: Sequence[str], in_order: bool
) -> Rows:
    size = sum(map(os.path.getsize, files))
    if kind == "webdataset":
        if size > ANNOUNCED_BYTES:
            log.warning(
                "%s: finding the images in %d tar files of %s", keys.source, len(files), _gigabytes(size)
            )
        return TarRows(files, column, keep)
    group = bytes_of_groups(files, column)
    if in_order or group <= LARGE_GROUP:
        return ParquetRows(files, column, keep)
    if size > ANNOUNCED_BYTES:
        log.warning(
            "%s: a row of %s can only be read with the %.0f MB of its row group, so the files are copied first, "
            "once: %s in %s; data.streaming=true reads them as they are",
            keys.source, source, group / 1e6, _gigabytes(size), datasets.config.HF_DATASETS_CACHE,
        )  # fmt: skip
    copied = datasets.load_dataset("parquet", data_files=files, split="train")
    return _encoded(copied, source, keys, column, keep)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def encoded_file(record: dict | None, name: str) -> io.BytesIO:
    """The bytes of a record as a file called `name`. Raises ValueError if it has none, OSError if unreadable."""
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
    """The name of a record in messages: its path, if it has one, with its place in the source."""
    path = (record or {}).get("path")
    return f"{path} ({place})" if path else place


def image_keys(images: Rows, column: str, source: str, most_read: int | None = None) -> list[bytes]:
    """A key for each image that tells it from the others: from its path, or from its contents if it has none.

    Of a path, the part within `source` if that is a folder. Of contents, the length and the last KiB, which is the
    end of the compressed pixels. `most_read`: where images have no paths, only so many are looked at, spread
    evenly.
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
    """The path of each row's image, None where it has none; contents are not read for it."""
    if isinstance(images, datasets.Dataset):
        return pc.struct_field(images.with_format("arrow")[:].column(column), "path").to_pylist()
    return images.image_names()


def column_values(images: Rows, name: str) -> list:
    """A whole column that was kept beside the images (`keep`); these are not read for it."""
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


def _open_hub(
    source: str, key: str, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    name, config, revision = HUB_ID.fullmatch(source).group("name", "config", "revision")
    missing = f"{key}: {source!r} is no file or folder here"
    try:
        # load_dataset would ask again and again, for half a minute, before it says that a name leads nowhere.
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except OfflineModeIsEnabled:
        pass  # load_dataset finds what is in the cache
    except Exception as error:  # the hub client's errors have changed their base with its versions
        raise FileNotFoundError(
            f"{missing}, and no data set of that name could be reached on the hub ({_cause(error)}); "
            f"allowed: {KINDS}"
        ) from error
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        raise FileNotFoundError(
            f"{missing}, and split {split!r} of the data set on the hub cannot be loaded ({_cause(error)})"
        ) from error
    return loaded


def _encoded(images, source: str, keys: Keys, column: str, keep: Sequence[str] = ()):
    """Keep the image column, as encoded bytes: datasets would decode whole pictures in the main process."""
    columns = images.column_names or []
    for name in (column, *keep):
        if name not in columns:
            raise ValueError(
                f"{keys.of(name, column)}: no column {name!r} in {source}; allowed: {', '.join(columns)}"
            )
    _check_kind(images.features[column], source, keys, column)
    return images.select_columns([column, *keep]).cast_column(column, datasets.Image(decode=False))


def _check_kind(kind: datasets.features.features.FeatureType, source: str, keys: Keys, column: str) -> None:
    # A struct of bytes or a path, encoded bytes, or a path.
    encoded = (
        "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "string")
    )
    if not encoded and not isinstance(kind, datasets.Image):
        raise ValueError(f"{keys.column}: column {column!r} of {source} holds {kind}, not images")


def _cause(error: BaseException) -> str:
    """The first line of the error that started a chain of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
