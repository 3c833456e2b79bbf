"""Expand patterns (braces, globs) to file names, and open local files and URLs of any protocol of fsspec."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from fsspec.asyn import AsyncFileSystem

from ..files import one_line

Record = TypeVar("Record")

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
READ_AHEAD = 4 * 2**20  # bytes of a remote file that are fetched at a time
ATTEMPTS = 4  # failures in a row, without a record in between, after which a remote file is given up

_kept_alive: list[AsyncFileSystem] = []


def _keep_file_systems() -> None:
    """Before a fork, add references to all asynchronous file systems, so that the child never closes them.

    Parent and child share one epoll instance. fsspec drops its cached file systems in the child; if that closed
    their connections, the parent's connections would be removed from the epoll instance too, and the parent's next
    read would hang until aiohttp's timeout of 300 s. The parent drops the references after the fork.
    """
    classes = [AsyncFileSystem]
    for cls in classes:
        classes += cls.__subclasses__()
        _kept_alive.extend(cls._cache.values())


os.register_at_fork(before=_keep_file_systems, after_in_parent=_kept_alive.clear)


def is_url(path: str) -> bool:
    """Whether a name is a URL of any protocol, rather than a local path or a hub id."""
    return URL.match(path) is not None


def expand(source: str, key: str) -> list[str]:
    """Expand a pattern to the sorted names of its files: braces as in `shard-{000..099}.tar`, then `*`, `?`, `**`.

    Returns an empty list if no local file matches; a URL without a glob is returned unchecked. If braces list
    several local files and some exist, all must. Raises FileNotFoundError for one that does not, and ValueError for
    braces that do not close and for an unknown protocol or one whose package is not installed; `key`, the option or
    configuration key that named the pattern, begins the message.
    """
    if not is_url(source) and os.path.exists(source):
        return [source]
    try:
        names = list(braceexpand(source))
    except UnbalancedBracesError:
        raise ValueError(
            f"{key}: {source}: its braces do not close; allowed: such as shard-{{000..099}}.tar"
        ) from None
    found = [file for name in names for file in _expand_glob(name, key)]
    if len(names) > 1 and found and not is_url(source):
        for name in names:
            if not glob.has_magic(name) and not os.path.exists(name):
                raise FileNotFoundError(f"{key}: {name}: no such file, one of the {len(names)} of {source}")
    return sorted(found)


def _expand_glob(name: str, key: str) -> list[str]:
    if not is_url(name):
        return [file for file in glob.glob(name, recursive=True) if os.path.isfile(file)]
    if not glob.has_magic(name):
        return [name]
    system = file_system(name, key)
    return [system.unstrip_protocol(file) for file in system.glob(name)]


def files_below(folder: str, suffixes: tuple[str, ...], key: str) -> list[str]:
    """Sorted URLs of all files with these suffixes (lower case) below a remote folder, except hidden ones."""
    system = file_system(folder, key)
    names = [system.unstrip_protocol(name) for name in system.find(folder)]
    below = len(folder.rstrip("/")) + 1
    return sorted(
        name
        for name in names
        if name.lower().endswith(suffixes)
        and not any(part.startswith(".") for part in name[below:].split("/"))
    )


def file_system(url: str, key: str) -> fsspec.AbstractFileSystem:
    """The fsspec file system of a URL. Raises ValueError for an unknown protocol or a missing package."""
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}: {url}: {one_line(error)}") from None


def open_file(path: str) -> BinaryIO:
    """Open a local file or a URL for reading in binary; a URL is fetched in blocks, ahead of sequential reads."""
    if not is_url(path):
        return open(path, "rb")
    system, name = fsspec.core.url_to_fs(path)
    return system.open(name, "rb", block_size=READ_AHEAD, cache_type="readahead")


def size_of(path: str) -> int | None:
    """Size of a local or remote file in bytes; None if the server does not tell."""
    if not is_url(path):
        return os.path.getsize(path)
    system, name = fsspec.core.url_to_fs(path)
    return system.size(name)


def read_with_retries(
    read: Callable[[int], Iterator[Record]], path: str, start: int, wait: Callable[[int], None]
) -> Iterator[Record]:
    """Yield the records `start`, `start + 1` ... of a file; if reading a remote one fails, read on from there.

    `read(n)` yields the records from number n on; `wait(k)` is called after the k-th failure in a row, before the
    next attempt. Raises OSError, one line that names the file, after `ATTEMPTS` failures in a row; for a local file
    and a file that does not exist, after the first.
    """
    position, attempt = start, 0
    while True:
        try:
            for record in read(position):
                yield record
                position, attempt = position + 1, 0
            return
        except Exception as error:  # tarfile's, pyarrow's, aiohttp's and botocore's have no common base
            attempt += 1
            if not is_url(path) or isinstance(error, FileNotFoundError) or attempt == ATTEMPTS:
                reason = one_line(error) or "no message"
                raise OSError(f"{path}: {type(error).__name__} after record {position} ({reason})") from None
            wait(attempt)
