"""The rows of a data set that needs no download: `rows[n]` -> {"image": {"bytes", "path"}, column: value, ...}."""

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

SHAPES = (8192, 1024)  # to train on, and for validation
DIGITS = 1500  # to train on, of 1,797
PATCHES = 80  # of a hundred faces, or strangers, to train on


class Sample(NamedTuple):
    """A data set: which numbers are in a split, the pixels and the columns of a number."""

    splits: dict[str, range]
    pixels: Callable[[int], NDArray[np.uint8]]  # (H, W) gray or (H, W, 3)
    values: Callable[[int], dict[str, Any]] = lambda number: {}
    features: dict[str, Any] = {}  # noqa: RUF012 - never changed


class SampleRows:
    """A split of a data set as rows; each image is encoded when it is first asked for, and then kept.

    `columns`: the names of those beside the image; `keep` are some of them.
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
        """A whole column that is kept beside the images."""
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
    return {"train": range(start, middle), "validation": range(middle, end)}


@cache
def _shape(number: int) -> Shape:
    return shape(number)


_NUMBER = datasets.Value("float64")
SAMPLES = {
    "sample-digits": Sample(
        _split(0, DIGITS, 1797),
        lambda number: digits()[0][number],
        lambda number: {"label": int(digits()[1][number])},
        {"label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])},
    ),
    "sample-shapes": Sample(
        _split(0, SHAPES[0], sum(SHAPES)),
        lambda number: draw(_shape(number)),
        lambda number: _shape(number)._asdict(),
        {"kind": datasets.ClassLabel(names=list(KINDS)), **dict.fromkeys(Shape._fields[1:], _NUMBER)},
    ),
    "sample-faces": Sample(_split(0, PATCHES, FACES), lambda number: face_patches()[number]),
    "sample-strangers": Sample(
        _split(FACES, FACES + PATCHES, 2 * FACES), lambda number: face_patches()[number]
    ),
}
