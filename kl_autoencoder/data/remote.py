"""Open files that URLs and patterns name: object storage and web servers through fsspec, braces, globs."""

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
BLOCK = 4 * 2**20  # bytes that are read ahead of a remote file at a time
ATTEMPTS = 4  # failures in a row, with no record in between, after which reading a remote file is given up

_kept: list[AsyncFileSystem] = []


def _keep_file_systems() -> None:
    """Keep the file systems of this process, while it forks, alive in the child, which does not use them.

    The two share an epoll instance: where fsspec drops them in the child, closing their connections takes the
    parent's own connections out of it, and the parent's next read waits until aiohttp gives up, 300 s.
    """
    classes = [AsyncFileSystem]
    for cls in classes:
        classes += cls.__subclasses__()
        _kept.extend(cls._cache.values())


os.register_at_fork(before=_keep_file_systems, after_in_parent=_kept.clear)


def is_url(path: str) -> bool:
    """Whether a name is a URL of any protocol, rather than a local path or a hub id."""
    return URL.match(path) is not None


def expand(source: str, key: str) -> list[str]:
    """The files that a pattern names, sorted: braces as in `shard-{000..099}.tar`, then `*`, `?` and `**`.

    An empty list if nothing local has that name. Where braces name local files, each of them must exist. Raises
    FileNotFoundError for one that does not, ValueError for a protocol whose package is not installed and for braces
    that do not close.
    """
    if not is_url(source) and os.path.exists(source):
        return [source]
    try:
        names = list(braceexpand(source))
    except UnbalancedBracesError:
        raise ValueError(
            f"{key}: {source}: its braces do not close; allowed: such as shard-{{000..099}}.tar"
        ) from None
    found = [file for name in names for file in _matching(name, key)]
    if len(names) > 1 and found and not is_url(source):
        for name in names:
            if not glob.has_magic(name) and not os.path.exists(name):
                raise FileNotFoundError(f"{key}: {name}: no such file, one of the {len(names)} of {source}")
    return sorted(found)


def _matching(name: str, key: str) -> list[str]:
    if not is_url(name):
        return [file for file in glob.glob(name, recursive=True) if os.path.isfile(file)]
    if not glob.has_magic(name):
        return [name]
    system = file_system(name, key)
    return [system.unstrip_protocol(file) for file in system.glob(name)]


def files_below(folder: str, suffixes: tuple[str, ...], key: str) -> list[str]:
    """The files with one of the suffixes anywhere below a folder that a URL names, without hidden ones, sorted."""
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
    """The file system of a URL. Raises ValueError naming the package that is missing, or the unknown protocol."""
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}: {url}: {one_line(error)}") from None


def open_file(path: str) -> BinaryIO:
    """Open a local file or a URL for reading; of a URL, blocks are read ahead, for reading in sequence."""
    if not is_url(path):
        return open(path, "rb")
    system, name = fsspec.core.url_to_fs(path)
    return system.open(name, "rb", block_size=BLOCK, cache_type="readahead")


def size_of(path: str) -> int | None:
    """Bytes of a file, None where a server does not say."""
    if not is_url(path):
        return os.path.getsize(path)
    system, name = fsspec.core.url_to_fs(path)
    return system.size(name)


def read_with_retries(
    read: Callable[[int], Iterator[Record]], path: str, start: int, wait: Callable[[int], None]
) -> Iterator[Record]:
    """Yield the records `start`, `start + 1` ... of a file; where a remote one fails, read on from the next record.

    `read(n)` yields the records from number n on; `wait(k)` is called after k failures in a row, before the next
    attempt. Raises OSError, one line that names the file, after `ATTEMPTS` failures in a row, and at once for a
    local file and for one that does not exist.
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
