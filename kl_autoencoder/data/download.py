"""Download remote parquet and tar files once, for sources that are read by row number."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import fsspec
from filelock import FileLock
from tqdm import tqdm

from ..files import one_line, replacing
from .remote import is_url, size_of

log = logging.getLogger(__name__)


def local_copies(files: Sequence[str], key: str) -> list[str]:
    """Return local paths of `files`, in order; those that are URLs are downloaded unless they have been before.

    Copies are kept in the cache of `datasets` (HF_DATASETS_CACHE). How many files of what size are downloaded is
    logged first. Of several processes on a machine one downloads a file and the others wait. Raises
    FileNotFoundError for a file that does not exist and ValueError for one that cannot be fetched; `key`, the
    option or configuration key of the source, begins the message.
    """
    targets = {file: _cache_path(file) for file in files if is_url(file)}
    missing = [file for file, target in targets.items() if not target.exists()]
    if missing:
        _announce(missing, key)
    for file in tqdm(missing, unit=" files", disable=None):
        try:
            _download(file, targets[file])
        except FileNotFoundError:
            raise FileNotFoundError(f"{key}: {file}: no such file") from None
        except Exception as error:  # each protocol raises its own
            reason = one_line(error) or type(error).__name__
            raise ValueError(f"{key}: {file} cannot be downloaded ({reason})") from None
    return [str(targets.get(file, file)) for file in files]


def _cache_path(url: str) -> Path:
    """Where the copy of a URL is kept."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + os.path.basename(url)
    return Path(datasets.config.HF_DATASETS_CACHE) / "files" / name


def _announce(files: Sequence[str], key: str) -> None:
    try:
        sizes = [size_of(file) for file in files]
    except Exception:  # the download itself will report the error
        sizes = [None]
    total = "of unknown size" if None in sizes else f"{sum(sizes) / 1e9:.3g} GB"
    log.warning(
        "%s: downloading %d files, %s, to %s; data.streaming=true trains without",
        key, len(files), total, datasets.config.HF_DATASETS_CACHE,
    )  # fmt: skip


def _download(url: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            system, name = fsspec.core.url_to_fs(url)
            with replacing(target) as beside:
                system.get_file(name, str(beside))
