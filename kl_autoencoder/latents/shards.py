"""The shards of a data set of latents on disk, written by any number of processes that never talk to one another.

Shard k is rows k * n to (k + 1) * n of the source, whoever writes it. A process that wants a shard locks byte k of
one file; the kernel lets go of that when the process ends, however it ends. A shard takes its name when it is
complete. So ranks may be killed, added and left out, at any time, and what comes out is the same.
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

ABOUT = b"kl_autoencoder.shard"  # in the metadata of a shard
MANIFEST, SKIPPED, CARD = "manifest.json", "skipped.csv", "README.md"
ROWS_AT_ONCE = 64  # in a row group: what is read at least


class ShardFolder:
    """`folder`/data/train-00003-of-00009.parquet ... of `rows` source rows, `shard_rows` a shard.

    data/ holds what `datasets.load_dataset(folder)` reads; it cannot read a shard of which nothing is left but the
    list of what was skipped, which goes to empty/.
    """

    def __init__(self, folder: Path, rows: int, shard_rows: int):
        self.folder, self.total, self.shard_rows = folder, rows, shard_rows
        self.count = -(-rows // shard_rows)
        if not (folder / MANIFEST).exists() and folder.exists():
            for path in folder.iterdir():  # another rank may be here already
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
        return range(k * self.shard_rows, min((k + 1) * self.shard_rows, self.total))

    def path(self, k: int, empty: bool = False) -> Path:
        return self.folder / ("empty" if empty else "data") / f"train-{k:05}-of-{self.count:05}.parquet"

    def find(self, k: int) -> Path | None:
        """Where shard k is, None if it is not complete."""
        return next((path for path in (self.path(k), self.path(k, True)) if path.exists()), None)

    def complete(self) -> list[int]:
        return [k for k in range(self.count) if self.find(k)]

    def claims(self, rank: int = 0, ranks: int = 1) -> Iterator[int]:
        """Incomplete shards that nobody else writes, each locked until `write` or the end of the process.

        First every `ranks`-th from `rank` on, then what others have left: on a file system without locks the
        processes would meet, and do work twice, only at the end.
        """
        own = range(rank % self.count, self.count, ranks) if self.count else ()
        for k in (*own, *(k for k in range(self.count) if k not in own)):
            if self.find(k) is None and self._claim(k):
                if self.find(k) is None:
                    yield k
                else:
                    self._release(k)

    def write(self, k: int, table: pa.Table, about: dict) -> None:
        """Shard k, with `about`, which JSON must be able to hold, in its metadata. The claim ends."""
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
        return json.loads(pq.read_schema(self.find(k)).metadata[ABOUT])

    def bind(self, binding: dict, notes: dict) -> None:
        """Write both into a new folder's manifest, or hold `binding` against the one that is there.

        Raises ValueError naming the first thing that differs: what is there was made in another way.
        """
        path = self.folder / MANIFEST
        with self._held(self.count):
            if not path.exists():
                _write_json(path, {**binding, **notes})
        there, wanted = json.loads(path.read_text()), json.loads(json.dumps(binding))
        for key, old, new in _differences(there, wanted):
            raise ValueError(
                f"{self.folder}: was made with {key} {old}, not {new}; choose another output folder"
            )

    def finish(self, result: dict, skipped: Sequence[Sequence]) -> dict:
        """Add `result` to the manifest, list what was `skipped` (row, source_id, reason), write the card.

        Returns the manifest.
        """
        with self._held(self.count):
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
        except OSError:  # no locks here; at worst two processes write the same
            return True
        return True

    def _release(self, k: int) -> None:
        with suppress(OSError):
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, k)

    @contextmanager
    def _held(self, k: int) -> Iterator[None]:
        """Byte k, waited for."""
        with suppress(OSError):
            fcntl.lockf(self.lock, fcntl.LOCK_EX, 1, k)
        yield
        self._release(k)


def read_manifest(folder: str | os.PathLike) -> dict:
    """Of a finished data set. Raises FileNotFoundError or ValueError naming the folder if it is not one."""
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
    for key in wanted:
        old, new = there.get(key), wanted[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
