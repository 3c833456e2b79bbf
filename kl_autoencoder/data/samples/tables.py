"""Rows of the data sets that need no download: `rows[n]` -> {"image": {"bytes", "path"}, column: value, ...}."""

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .installed import FACES, digits, face_patches
from .shapes import KINDS, Shape, draw, shape

TRAIN_SHAPES, VALIDATION_SHAPES = 8192, 1024
TRAIN_DIGITS = 1500  # of 1,797; the others are for validation
TRAIN_PATCHES = 80  # of 100 faces, and of 100 other patches; the others are for validation


class Sample(NamedTuple):
    """A data set of numbered images.

    splits: the numbers in each split. pixels(number): (H, W) gray or (H, W, 3) RGB. values(number): {column: value}
    of the columns in `features`, which holds their types.
    """

    splits: dict[str, range]
    pixels: Callable[[int], NDArray[np.uint8]]
    values: Callable[[int], dict[str, Any]] = lambda number: {}
    features: dict[str, Any] = {}  # noqa: RUF012 - never changed


class SampleRows:
    """The rows of a split of data set `name`; an image is encoded as PNG when it is first read, and then kept.

    `column`: the name of the image column; `keep`: those of the other columns (`columns` has all of them) in a row.
    """

    def __init__(self, name: str, split: Literal["train", "validation"], column: str, keep: Sequence[str]):
        self.name, self.sample, self.fields = name, SAMPLES[name], (column, *keep)
        self.numbers, self.columns = self.sample.splits[split], tuple(self.sample.features)
        self.encoded = cache(self._encode)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = self.numbers[row]
        column, *keep = self.fields
        values = self.sample.values(number) if keep else {}
        image = {"bytes": self.encoded(number), "path": self._path(number)}
        return {column: image, **{name: values[name] for name in keep}}

    def image_names(self) -> list[str | None]:
        return [self._path(number) for number in self.numbers]

    def values(self, name: str) -> list[Any]:
        """All values of a column."""
        return [self.sample.values(number)[name] for number in self.numbers]

    @property
    def features(self) -> datasets.Features:
        column, *keep = self.fields
        kept = {name: self.sample.features[name] for name in keep}
        return datasets.Features({column: datasets.Image(decode=False), **kept})

    def _path(self, number: int) -> str:
        return f"{self.name.removeprefix('sample-')}-{number:05d}.png"

    def _encode(self, number: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.sample.pixels(number)).save(file, "PNG", compress_level=1)
        return file.getvalue()


def _split(start: int, middle: int, end: int) -> dict[str, range]:
    """The numbers from `start` up to `middle` for training, from there up to `end` for validation."""
    return {"train": range(start, middle), "validation": range(middle, end)}


@cache
def _shape(number: int) -> Shape:
    return shape(number)


_NUMBER = datasets.Value("float64")
SAMPLES = {
    "sample-digits": Sample(
        _split(0, TRAIN_DIGITS, 1797),
        lambda number: digits()[0][number],
        lambda number: {"label": int(digits()[1][number])},
        {"label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])},
    ),
    "sample-shapes": Sample(
        _split(0, TRAIN_SHAPES, TRAIN_SHAPES + VALIDATION_SHAPES),
        lambda number: draw(_shape(number)),
        lambda number: _shape(number)._asdict(),
        {"kind": datasets.ClassLabel(names=list(KINDS)), **dict.fromkeys(Shape._fields[1:], _NUMBER)},
    ),
    "sample-faces": Sample(_split(0, TRAIN_PATCHES, FACES), lambda number: face_patches()[number]),
    "sample-strangers": Sample(
        _split(FACES, FACES + TRAIN_PATCHES, 2 * FACES), lambda number: face_patches()[number]
    ),
}
