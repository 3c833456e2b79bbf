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
    """Download those of `files` that are URLs, unless the cache of `datasets` has a copy; return all local paths.

    Number and size of the files are logged before. One process of a machine downloads a file while others wait.
    Raises FileNotFoundError for a file that is not there and ValueError for one that cannot be fetched.
    """
    targets = {file: _target(file) for file in files if is_url(file)}
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


def _target(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + os.path.basename(url)
    return Path(datasets.config.HF_DATASETS_CACHE) / "files" / name


def _announce(files: Sequence[str], key: str) -> None:
    try:
        sizes = [size_of(file) for file in files]
    except Exception:  # the download itself will report it
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
