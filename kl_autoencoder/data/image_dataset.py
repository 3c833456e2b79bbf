"""The images of a source for evaluation and validation: numbered, and cropped and scaled alike each time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .image_io import load_image, open_image
from .sources import Keys, encoded_file, open_source, record_name

DATA = Keys("--data", "--image-column")
SMALLEST = 64  # pixels a side: below, LPIPS has no pixels left in its last layers


class Photograph(NamedTuple):
    """An image of a source, as it is measured."""

    number: int  # its place in the source
    name: str
    image: Tensor  # (1, C, H, W), float32 in [-1, 1]
    label: int | None = None  # number of its class, where the images have classes


class Photographs:
    """The images in the rows `rows` (None: all) of an opened source, at one size.

    `records`: of `open_source`, or any sequence of {column: record}. `size` N scales the short side to N
    (bicubic, antialiased) and crops the centre square; None keeps every pixel. Images of less than `smallest`
    pixels a side are left out. `channels`: C of the images, 1 (gray), 3 (RGB) or 4 (RGBA).
    `label`: from a record with {"columns": its row} to the number of its class. `change`: what becomes of an image,
    from it and its row.
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
        change: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.records, self.source, self.size, self.column = records, source, size, column
        self.channels, self.label, self.change = channels, label, change
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
        """The first `limit` images (None: all) of what --data names, to compare models on.

        Raises as `open_source`; ValueError for a size below `SMALLEST`.
        """
        if size is not None and size < SMALLEST:
            raise ValueError(f"--size: {size}; allowed: native, or a number from {SMALLEST} on")
        records = open_source(source, DATA, column, split, samples="validation", in_order=True)
        return cls(records, source, size, column, range(min(len(records), limit or len(records))))

    @property
    def rule(self) -> str:
        """A phrase for reports that says how the images of the source are cropped and scaled."""
        if self.size is None:
            return "every pixel as it is"
        return (
            f"short side scaled to {self.size} (bicubic, antialiased), centre {self.size}x{self.size} cropped"
        )

    def __getitem__(self, number: int) -> Photograph:
        """Image `number`. Raises ValueError or OSError if it cannot be read or is too small."""
        return self.at(number, self.size)

    def at(self, number: int, size: int | None) -> Photograph:
        """Image `number`, cropped and scaled by the same rule to another size (None: every pixel)."""
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
        return Photograph(number, name, self.change(image, row) if self.change else image, label)

    def _name(self, record: dict, row: int) -> str:
        """The path within the source, if that is a folder; else as in `record_name`."""
        path, folder = (record or {}).get("path"), Path(self.source).expanduser()
        if path and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return record_name(record, f"row {row}")

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Photograph]]:
        """Every `ranks`-th batch from number `rank` on. Images that cannot be used are left out, see `skipped`.

        The number of ranks does not change which images form a batch, and so does not change the numbers computed
        of them. Images at their native sizes form batches of one.
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
