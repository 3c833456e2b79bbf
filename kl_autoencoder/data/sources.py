"""Where photographs come from: the name of a source -> a `datasets` data set of images that are not decoded yet.

Everything here runs in the main process and looks at no pixel. A record is {"bytes": ... or None, "path": ...
or None}, as `datasets.Image(decode=False)` gives it; `encoded_file` makes a file of one.
"""

import glob
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import fsspec
import skimage
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
KINDS = (
    "a folder of images, parquet or webdataset (.tar) files or a glob of them, a folder written by "
    "datasets.save_to_disk, a data set id on the Hugging Face hub, or sample-photographs"
)
SAMPLE_PHOTOGRAPHS = "sample-photographs"
# The colour photographs in the wheel of scikit-image, without the two medical ones, whose one colour would be half
# of what is seen. No scene is on both sides: the two motorcycles are a stereo pair.
SAMPLE_FILES = {
    "train": ("coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    "validation": ("astronaut.png", "chelsea.png"),
}  # fmt: skip

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
    path = os.path.expanduser(source)
    if source == SAMPLE_PHOTOGRAPHS:
        folder = Path(skimage.__file__).parent / "data"
        images = _image_files([str(folder / name) for name in SAMPLE_FILES[samples]], column)
    elif os.path.isdir(path):
        images = _open_folder(path, keys.source, column, split, streaming)
    elif files := sorted(glob.glob(path, recursive=True)):
        images = _open_files(files, source, keys.source, column, streaming)
    else:
        images = _open_hub(source, keys.source, split, streaming)
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


def _open_folder(path: str, key: str, column: str, split: str, streaming: bool) -> Images:
    if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(
        os.path.join(path, "dataset_dict.json")
    ):
        return _open_saved(path, key, split)
    images, tables = _files_below(path, IMAGE_SUFFIXES), _files_below(path, tuple(BUILDERS))
    if images and tables:
        raise ValueError(
            f"{key}: {path} holds both images ({images[0]}) and data files ({tables[0]}); "
            "allowed: a folder of one kind, or a glob such as FOLDER/*.parquet"
        )
    if tables:
        return _open_files(tables, path, key, column, streaming)
    if not images:
        raise ValueError(
            f"{key}: no images in {path}; allowed: {KINDS}. Images end in {' '.join(IMAGE_SUFFIXES)}"
        )
    return _image_files(images, column)


def _files_below(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Recursive, hidden names left out, sorted so that the order is that of every other machine."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


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


def _open_files(files: list[str], source: str, key: str, column: str, streaming: bool) -> Images:
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    if suffixes <= set(IMAGE_SUFFIXES):
        return _image_files(files, column)
    if len(suffixes) != 1 or not suffixes <= set(BUILDERS):
        raise ValueError(f"{key}: {source} is {' and '.join(sorted(suffixes))} files; allowed: {KINDS}")
    builder = BUILDERS[suffixes.pop()]
    try:
        loaded = datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming)
    except Exception as error:  # pyarrow's, tarfile's, datasets' own: no common base
        raise ValueError(f"{key}: {source} cannot be read as {builder} files ({_cause(error)})") from error
    return loaded


def _open_hub(source: str, key: str, split: str, streaming: bool) -> Images:
    missing = f"{key}: {source!r} is no file or folder here"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{missing}; allowed: {KINDS}")
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
