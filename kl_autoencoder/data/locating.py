"""Find the kind and the files of an image source from its name, without opening a file or a heavy import."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

from ..extras import require
from . import remote
from .formats import READABLE

DATA_FILE_KINDS = {".parquet": "parquet", ".tar": "webdataset"}  # suffix -> kind of `Located`
KINDS = (
    "a folder of images, parquet or webdataset (.tar) files, a pattern or URL of such (shard-{000..099}.tar, "
    "s3://bucket/*.parquet), a folder by save_to_disk, a hub id (owner/name:config@revision), or "
    "sample-photographs, sample-digits, sample-shapes, sample-faces, sample-strangers"
)
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
SAMPLE_PHOTOGRAPHS = "sample-photographs"
SAMPLES = ("sample-digits", "sample-shapes", "sample-faces", "sample-strangers")  # as in samples/tables.py
# The colour photographs in scikit-image's wheel, except for two medical ones, in which one colour would make up
# half of all pixels. The two motorcycles are a stereo pair, and both in `train`, so that no scene is in both
# splits.
SAMPLE_FILES = {
    "train": ("coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    "validation": ("astronaut.png", "chelsea.png"),
}  # fmt: skip


class Located(NamedTuple):
    """The kind of a source and its files.

    files: the image files or data files; for "saved" the one folder, for "hub" and "sample" the one name.
    """

    kind: Literal["images", "parquet", "webdataset", "saved", "hub", "sample"]
    files: list[str]


def locate(source: str, key: str, samples: Literal["train", "validation"] = "train") -> Located:
    """Find the kind and the files of a source by its name; `KINDS` lists what it may be.

    `key`: the option or configuration key that names the source; error messages begin with it. `samples`: the split
    to take of sample-photographs. Raises FileNotFoundError if nothing of that name exists, ValueError for a folder
    or files that cannot be a source; a hub id is not looked up.
    """
    path = os.path.expanduser(source)
    if source == SAMPLE_PHOTOGRAPHS:
        return Located("images", _sample_photographs(samples))
    if source in SAMPLES:
        return Located("sample", [source])
    if os.path.isdir(path):
        return _locate_folder(path, key)
    if files := remote.expand(path, key):
        if remote.is_url(path) and not path.lower().endswith((*READABLE, *DATA_FILE_KINDS)):
            return _locate_remote_folder(path, key)
        return _locate_files(files, source, key)
    if remote.is_url(path):
        raise FileNotFoundError(f"{key}: {source}: nothing there; allowed: {KINDS}")
    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{key}: {source!r} is no file or folder here; allowed: {KINDS}")
    return Located("hub", [source])


def _sample_photographs(samples: str) -> list[str]:
    require("train", "skimage")
    package = find_spec("skimage")  # finds its folder without importing it
    folder = os.path.join(os.path.dirname(package.origin), "data")
    return [os.path.join(folder, name) for name in SAMPLE_FILES[samples]]


def _locate_remote_folder(path: str, key: str) -> Located:
    try:
        files = remote.files_below(path, (*READABLE, *DATA_FILE_KINDS), key)
    except OSError as error:
        raise FileNotFoundError(f"{key}: {path} cannot be listed ({error})") from None
    if not files:
        raise FileNotFoundError(f"{key}: {path}: no images and no data files there; allowed: {KINDS}")
    return _locate_files(files, path, key)


def _locate_folder(path: str, key: str) -> Located:
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        return Located("saved", [path])
    found = _files_below(path, (*READABLE, *DATA_FILE_KINDS))
    data_files = [file for file in found if file.lower().endswith(tuple(DATA_FILE_KINDS))]
    images = [file for file in found if not file.lower().endswith(tuple(DATA_FILE_KINDS))]
    if images and data_files:
        raise ValueError(
            f"{key}: {path} holds both images ({images[0]}) and data files ({data_files[0]}); "
            "allowed: a folder of one kind, or a glob such as FOLDER/*.parquet"
        )
    if data_files:
        return _locate_files(data_files, path, key)
    if not images:
        raise ValueError(f"{key}: no images in {path}; allowed: {KINDS}")
    return Located("images", images)


def _files_below(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths of all files below a folder with these suffixes (lower case), except what is hidden."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def _locate_files(files: Sequence[str], source: str, key: str) -> Located:
    """Find the kind of files by their suffixes. Raises ValueError unless it is the same for all."""
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    if suffixes <= set(READABLE):
        return Located("images", list(files))
    if len(suffixes) != 1 or not suffixes <= set(DATA_FILE_KINDS):
        raise ValueError(f"{key}: {source} is {' and '.join(sorted(suffixes))} files; allowed: {KINDS}")
    return Located(DATA_FILE_KINDS[suffixes.pop()], list(files))
