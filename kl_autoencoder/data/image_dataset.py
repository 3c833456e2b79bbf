"""The numbered images of a source, each always the same pixels: what models are compared on."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .image_io import load_image, open_image
from .sources import Keys, encoded_file, open_source, record_name

DATA = Keys("--data", "--image-column")
SMALLEST = 64  # pixels a side: below, LPIPS has no pixels left in its last layers


class Photograph(NamedTuple):
    number: int  # its place in the source
    name: str
    image: Tensor  # (1, 3, H, W), float32 in [-1, 1]


class Photographs:
    """The first `limit` images of a source (all: None), at one size.

    `size` N scales the short side to N (bicubic, antialiased) and crops the centre square; None keeps every pixel.
    Raises as `open_source`; ValueError for a size below `SMALLEST`.
    """

    def __init__(
        self,
        source: str,
        size: int | None,
        column: str = "image",
        split: str = "validation",
        limit: int | None = None,
    ):
        if size is not None and size < SMALLEST:
            raise ValueError(f"--size: {size}; allowed: native, or a number from {SMALLEST} on")
        self.source, self.size, self.column = source, size, column
        self.records = open_source(source, DATA, column, split, samples="validation")
        self.count = min(len(self.records), limit or len(self.records))
        self.skipped: dict[int, str] = {}  # number -> why it cannot be used

    @property
    def rule(self) -> str:
        """How photographs become the images that are compared."""
        if self.size is None:
            return "every pixel as it is"
        return (
            f"short side scaled to {self.size} (bicubic, antialiased), centre {self.size}x{self.size} cropped"
        )

    def __getitem__(self, number: int) -> Photograph:
        """ValueError or OSError if it cannot be read or is too small."""
        return self.at(number, self.size)

    def at(self, number: int, size: int | None) -> Photograph:
        """Photograph `number`, by the same rule at another size."""
        record = self.records[number][self.column]
        name = self._name(record, number)
        image = load_image(open_image(encoded_file(record, name)), size, multiple_of=1)
        if min(image.shape[2:]) < SMALLEST:
            height, width = image.shape[2:]
            raise ValueError(f"{name}: {width}x{height} pixels; allowed: {SMALLEST} a side and more")
        return Photograph(number, name, image)

    def _name(self, record: dict, number: int) -> str:
        """Its path in the folder that it is from, if it is from one."""
        path, folder = (record or {}).get("path"), Path(self.source).expanduser()
        if path and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return record_name(record, f"row {number}")

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Photograph]]:
        """Every `ranks`-th batch from number `rank` on. What cannot be used is left out and noted in `skipped`.

        A photograph is in the same batch whatever the number of ranks, so that it gives the same numbers; at
        their native sizes each is alone.
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
