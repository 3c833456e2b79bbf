"""Read images of a source in a model's size and channels, with their classes numbered as by the trainer."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..console import say
from ..data.image_io import load_image, open_image
from ..data.sources import Keys, Rows, column_values, encoded_file, image_names, open_source, record_name
from ..progress import tracked

KEYS = Keys("--data", "--image-column", "--label-column")


class LabelledImages(NamedTuple):
    """images: (N, C, H, W) in [-1, 1]. classes: (N,), int64, or None. names: of the classes, by number."""

    images: Tensor
    classes: Tensor | None
    names: list[str]


def read_labelled(
    source: str, size: int, channels: int, limit: int, image_column: str, label_column: str | None, split: str
) -> LabelledImages:
    """Read at most `limit` images, spread evenly over a source: centre squares, scaled to `size` pixels a side.

    Classes are those of `label_column`; without one, they are the folders of the files, if there are several. Class
    numbers are kept; names are numbered in sorted order over the whole source. Unreadable images are reported and
    left out. Raises the errors of `open_source`, and ValueError if fewer than two images can be read.
    """
    keep = () if label_column is None else (label_column,)
    samples = "train" if split == "train" else "validation"
    rows = open_source(source, KEYS, image_column, split, samples, keep, in_order=True)
    labels = _labels(rows, image_column, label_column)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), limit)).round().astype(int)).tolist()
    images, read = [], []
    for number in tracked(chosen, "reading", "images"):
        record = rows[number][image_column]
        name = record_name(record, f"row {number}")
        try:
            opened = open_image(encoded_file(record, name), channels)
            images.append(load_image(opened, size, multiple_of=1, channels=channels))
            read.append(number)
        except (ValueError, OSError) as error:
            say("skipped", error)
    if len(images) < 2:
        raise ValueError(f"--data: {len(images)} images of {source} could be read; allowed: at least 2")
    classes, names = _numbered(labels, _names_in(rows, label_column))
    return LabelledImages(torch.cat(images), None if classes is None else classes[read], names)


def binarised(images: Tensor, kind: str, seed: int) -> Tensor:
    """Binarise images in [-1, 1] to black (-1) and white (1).

    kind: "fixed" makes levels above the middle white; "dynamic" makes a pixel white with its level, as a number
    from 0 to 1, as probability.
    """
    chance = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    white = (images + 1) / 2 > (chance if kind == "dynamic" else 0.5)
    return white.float() * 2 - 1


def _labels(rows: Rows, image_column: str, label_column: str | None) -> list[Any]:
    if label_column is not None:
        return column_values(rows, label_column)
    paths = image_names(rows, image_column)
    return [None if path is None else os.path.basename(os.path.dirname(path)) for path in paths]


def _names_in(rows: Rows, label_column: str | None) -> list[str] | None:
    """The names that the data set gives to the numbers in its label column, or None."""
    features = getattr(rows, "features", None) or {}
    return getattr(features.get(label_column), "names", None)


def _numbered(labels: Sequence[Any], names: list[str] | None) -> tuple[Tensor | None, list[str]]:
    """Labels -> class numbers (N,) and names of the classes; (None, []) if labels are missing or all the same."""
    found = set(labels)
    if len(found) < 2 or not all(isinstance(label, (str, int)) and label != "" for label in found):
        return None, []
    if all(isinstance(label, int) and label >= 0 for label in found):
        return torch.tensor(labels), names or [str(number) for number in range(max(found) + 1)]
    order = {label: number for number, label in enumerate(sorted(found, key=str))}
    return torch.tensor([order[label] for label in labels]), [str(label) for label in order]
