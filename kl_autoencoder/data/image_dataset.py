"""Numbered images of a source for evaluation and validation, cropped and scaled the same way each time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .image_io import load_image, open_image
from .sources import Keys, encoded_file, open_source, record_name

DATA = Keys("--data", "--image-column")
SMALLEST = 64  # pixels a side; in smaller images nothing is left for the last layers of LPIPS


class Photograph(NamedTuple):
    """An image of a source, cropped and scaled as it is evaluated."""

    number: int  # among the images of `Photographs`, from 0
    name: str  # for reports and messages
    image: Tensor  # (1, C, H, W), float32 in [-1, 1]
    label: int | None = None  # number of its class, from 0; None where images have no classes


class Photographs:
    """The images of an opened source, at one size.

    `records`: rows as `open_source` returns them, or any sequence of {column: record}; `rows` selects row numbers
    (None: all). `source`: the name of the source; if it is a folder, images are named by their path in it. `size` N
    scales the short side to N pixels (bicubic, antialiased) and crops the centre square; None keeps every pixel.
    Images with a side below `smallest` pixels are left out. `channels`: 1 (gray), 3 (RGB) or 4 (RGBA).
    `label(record)` returns the number of a record's class; the record has its whole row under "columns".
    `transform(image, row)` is applied to each image (1, C, H, W) in [-1, 1].
    """

    def __init__(
        self,
        records: Sequence[dict],
        source: str,
        size: int | None,
        column: str = "image",
        rows: Sequence[int] | None = None,
        smallest: int = SMALLEST,
        channels: int = 3,
        label: Callable[[dict], int] | None = None,
        transform: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.records, self.source, self.size, self.column = records, source, size, column
        self.channels, self.label, self.transform = channels, label, transform
        self.rows = range(len(records)) if rows is None else rows
        self.count, self.smallest = len(self.rows), smallest
        self.skipped: dict[int, str] = {}  # number -> why it cannot be used

    @classmethod
    def open(
        cls,
        source: str,
        size: int | None,
        column: str = "image",
        split: str = "validation",
        limit: int | None = None,
    ) -> "Photographs":
        """Open the source that --data names, to compare models on its first `limit` images (None: all).

        `size` as in the class. Raises the errors of `open_source`, and ValueError for a size below `SMALLEST`.
        """
        if size is not None and size < SMALLEST:
            raise ValueError(f"--size: {size}; allowed: native, or a number from {SMALLEST} on")
        records = open_source(source, DATA, column, split, samples="validation", in_order=True)
        return cls(records, source, size, column, range(min(len(records), limit or len(records))))

    @property
    def rule(self) -> str:
        """How images are cropped and scaled, as a phrase for reports."""
        if self.size is None:
            return "every pixel as it is"
        return (
            f"short side scaled to {self.size} (bicubic, antialiased), centre {self.size}x{self.size} cropped"
        )

    def __getitem__(self, number: int) -> Photograph:
        """Read image `number`. Raises ValueError if it is too small, ValueError or OSError if it cannot be read."""
        return self.at(number, self.size)

    def at(self, number: int, size: int | None) -> Photograph:
        """Read image `number` at another `size`, None for every pixel; otherwise as `[number]`."""
        row = int(self.rows[number])
        values = self.records[row]
        record = values[self.column]
        name = self._name(record, row)
        opened = open_image(encoded_file(record, name), self.channels)
        image = load_image(opened, size, multiple_of=1, channels=self.channels)
        if min(image.shape[2:]) < self.smallest:
            height, width = image.shape[2:]
            raise ValueError(f"{name}: {width}x{height} pixels; allowed: {self.smallest} a side and more")
        label = None if self.label is None else self.label({**record, "columns": values})
        return Photograph(number, name, self.transform(image, row) if self.transform else image, label)

    def _name(self, record: dict, row: int) -> str:
        """The image's path relative to the source if that is a folder; else its `record_name`."""
        path, folder = (record or {}).get("path"), Path(self.source).expanduser()
        if path and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return record_name(record, f"row {row}")

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Photograph]]:
        """Yield the batches of one rank: batches `rank`, `rank + ranks` ... of `size` images each.

        Images at their native sizes form batches of one. Which images form a batch does not depend on `ranks`, so
        neither does what is computed from them. Images that cannot be used are left out and noted in `skipped`.
        """
        size = 1 if self.size is None else size
        starts = range(0, self.count, size)
        for start in starts[rank::ranks]:
            batch = []
            for number in range(start, min(start + size, self.count)):
                try:
                    batch.append(self[number])
                except (ValueError, OSError) as error:
                    self.skipped[number] = str(error)
            if batch:
                yield batch
