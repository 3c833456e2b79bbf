"""The shards of a data set of latents on disk, written by any number of processes that do not communicate.

Shard k holds rows k * n to (k + 1) * n - 1 of the source, whichever process writes it. To claim a shard, a process
locks byte k of one file; the kernel releases the lock when the process ends, even if it is killed. A shard gets its
final name when it is complete. Ranks may therefore be killed, added and left out at any time without changing the
result.
"""

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import replacing
from .dataset_card import dataset_card

ABOUT = b"kl_autoencoder.shard"  # metadata key of a shard, for what `ShardFolder.write` is told about it
MANIFEST, SKIPPED, CARD = "manifest.json", "skipped.csv", "README.md"
ROWS_AT_ONCE = 64  # rows of a row group, the smallest part that can be read


class ShardFolder:
    """The shards `folder`/data/train-00003-of-00009.parquet ... of a source of `rows` rows, `shard_rows` in each.

    data/ has the shards that `datasets.load_dataset(folder)` reads. Shards without rows, of which all images were
    skipped, are in empty/, because `datasets` cannot read them. Raises ValueError if the folder is not a data set
    of latents and has other content.
    """

    def __init__(self, folder: Path, rows: int, shard_rows: int):
        self.folder, self.total, self.shard_rows = folder, rows, shard_rows
        self.count = -(-rows // shard_rows)
        if not (folder / MANIFEST).exists() and folder.exists():
            for path in folder.iterdir():  # data/ and empty/ may be there already, from another rank
                if path.name not in ("data", "empty") and not path.name.startswith("."):
                    raise ValueError(f"{folder}: holds other things than latents ({path.name})")
        for name in ("data", "empty"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.lock = (folder / ".lock").open("a")

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()  # ends all claims

    def rows(self, k: int) -> range:
        """The rows of the source that shard k is made from."""
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.total))

    def path(self, k: int, empty: bool = False) -> Path:
        """The file of shard k, in data/ or, if it has no rows, in empty/."""
        return self.folder / ("empty" if empty else "data") / f"train-{k:05}-of-{self.count:05}.parquet"

    def find(self, k: int) -> Path | None:
        """The file of shard k, None if it is not complete."""
        return next((path for path in (self.path(k), self.path(k, True)) if path.exists()), None)

    def complete(self) -> list[int]:
        """The numbers of the shards that are complete."""
        return [k for k in range(self.count) if self.find(k)]

    def claims(self, rank: int = 0, ranks: int = 1) -> Iterator[int]:
        """Yield incomplete shards that no other process writes, locked until `write` or the end of the process.

        First every `ranks`-th shard from `rank` on, then those that other ranks have left. In this order, processes
        on a file system without locks work on the same shards, twice, only at the end.
        """
        own = range(rank % self.count, self.count, ranks) if self.count else ()
        for k in (*own, *(k for k in range(self.count) if k not in own)):
            if self.find(k) is None and self._claim(k):
                if self.find(k) is None:
                    yield k
                else:
                    self._release(k)

    def write(self, k: int, table: pa.Table, about: dict) -> None:
        """Write shard k, with `about` (serialisable to JSON) in its metadata, and release its lock."""
        target = self.path(k, empty=not len(table))
        table = table.replace_schema_metadata({**table.schema.metadata, ABOUT: json.dumps(about)})
        with replacing(
            target
        ) as temporary:  # floating-point bytes hardly compress, and no two rows are alike
            pq.write_table(
                table, temporary, compression="none", use_dictionary=False, row_group_size=ROWS_AT_ONCE
            )
        self._release(k)

    def about(self, k: int) -> dict:
        """The `about` that shard k was written with."""
        return json.loads(pq.read_schema(self.find(k)).metadata[ABOUT])

    def bind(self, binding: dict, notes: dict) -> None:
        """Write both into the manifest of a new folder, or compare `binding` with the manifest that is there.

        Raises ValueError, which names the first difference, if that data set was made in another way.
        """
        path = self.folder / MANIFEST
        with self._locked(self.count):
            if not path.exists():
                _write_json(path, {**binding, **notes})
        there, wanted = json.loads(path.read_text()), json.loads(json.dumps(binding))
        for key, old, new in _differences(there, wanted):
            raise ValueError(
                f"{self.folder}: was made with {key} {old}, not {new}; choose another output folder"
            )

    def finish(self, result: dict, skipped: Sequence[Sequence]) -> dict:
        """Add `result` to the manifest, write skipped.csv and the card, and return the manifest.

        skipped: (row, source_id, reason) of each image that was skipped.
        """
        with self._locked(self.count):
            for left_by_the_killed in (*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")):
                left_by_the_killed.unlink(missing_ok=True)
            with replacing(self.folder / SKIPPED) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([("row", "source_id", "reason"), *skipped])
            manifest = {**json.loads((self.folder / MANIFEST).read_text()), **result}
            with replacing(self.folder / CARD) as temporary:
                temporary.write_text(dataset_card(manifest), encoding="utf-8")
            _write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _claim(self, k: int) -> bool:
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, k)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: at worst two processes write the same shard
            return True
        return True

    def _release(self, k: int) -> None:
        with suppress(OSError):
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, k)

    @contextmanager
    def _locked(self, k: int) -> Iterator[None]:
        """Hold the lock on byte k, after waiting for it."""
        with suppress(OSError):
            fcntl.lockf(self.lock, fcntl.LOCK_EX, 1, k)
        yield
        self._release(k)


def read_manifest(folder: str | os.PathLike) -> dict:
    """Read the manifest of a finished data set.

    Raises FileNotFoundError or ValueError, which name the folder, if it is not a finished data set of latents.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no data set of latents ({MANIFEST} is missing)")
    try:
        manifest = json.loads(path.read_text())
        finished = "statistics" in manifest
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of encode-dataset") from error
    if not finished:
        raise ValueError(f"{folder}: is not complete; run the same encode-dataset again to continue")
    return manifest


def _differences(there: dict, wanted: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield (dotted key, old value, new value) where `there` differs from `wanted`; its other keys do not count."""
    for key in wanted:
        old, new = there.get(key), wanted[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
