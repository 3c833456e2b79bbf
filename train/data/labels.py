"""The classes of images: the number of each, from a column of the source or the folders that its files lie in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kl_autoencoder.data.file_streams import Stream
from kl_autoencoder.data.sources import Rows, column_values, image_names


class ClassOutOfRange(ValueError):
    """A label that ends the run, unlike an image that cannot be read: the message names the key."""


class Source(NamedTuple):
    """Where labels are looked for: the name of the source, its image column, and its label column or folders."""

    name: str
    image_column: str
    label_column: str | None
    folders: bool

    @property
    def key(self) -> str:
        return "data.labels" if self.label_column is None else "data.label_column"


@dataclass(frozen=True)
class Labels:
    """The number of a record's class: `labels(record)`, a whole number from 0 on.

    names: those of the classes in sorted order, the number of each being its place; None where labels are numbers
    already. classes: how many the network knows, if that is limited.
    """

    source: Source
    names: tuple[str, ...] | None
    classes: int | None

    def __call__(self, record: dict) -> int:
        """The class of a record {"path", "columns": its row}. Raises ValueError where it has none or another."""
        column = self.source.label_column
        label = _folder(record["path"]) if column is None else record["columns"][column]
        if label is None:
            raise ValueError("no label")
        if self.names is None:
            return self.in_range(label)
        if label not in self.names:
            raise ValueError(f"class {label!r} is none of the {len(self.names)} of data.train")
        return self.names.index(label)

    def in_range(self, label: Any) -> int:
        """A label that is a number already. Raises ClassOutOfRange for one below 0 or from `classes` on."""
        top = "on" if self.classes is None else f"to {self.classes - 1} (model.classes={self.classes})"
        if not isinstance(label, int) or label < 0 or (self.classes is not None and label >= self.classes):
            raise ClassOutOfRange(f"{self.source.key}: {label!r}; allowed: whole numbers from 0 {top}")
        return int(label)


def labels_of_rows(source: Source, images: Rows, classes: int | None) -> Labels | None:
    """The labels of a source that is read by row number, all of them checked; None where images have no classes.

    Raises ValueError, naming the key, for labels that are neither names nor numbers, for more than `classes`, and
    for folders where images have no paths.
    """
    if source.label_column is not None:
        return _labels_of(source, column_values(images, source.label_column), classes)
    if not source.folders:
        return None
    paths = image_names(images, source.image_column)
    if None in paths:
        raise ValueError(f"data.labels: folders, but images of {source.name} have no paths; allowed: null")
    return _labels_of(source, [_folder(path) for path in paths], classes)


def labels_of_stream(source: Source, stream: Stream, classes: int | None) -> Labels | None:
    """The same of a stream. Where its labels cannot be read without its images they are checked one by one.

    They must then be numbers, since names can be numbered only once all are known.
    """
    if source.folders:
        raise ValueError(
            "data.labels: folders with data.streaming=true; allowed: null, or data.streaming=false"
        )
    if source.label_column is None:
        return None
    values = stream.values(source.label_column)
    if values is None:
        return Labels(source, None, classes)
    return _labels_of(source, values, classes)


def _labels_of(source: Source, values: Sequence[Any], classes: int | None) -> Labels:
    known = {value for value in values if value is not None}
    if not known:
        raise ValueError(
            f"{source.key}: no labels in {source.name}; allowed: names, or whole numbers from 0 on"
        )
    if not all(isinstance(value, str) for value in known):
        labels = Labels(source, None, classes)
        for value in known:
            labels.in_range(value)
        return labels
    if classes is not None and len(known) > classes:
        raise ValueError(
            f"{source.key}: {len(known)} classes in {source.name}; allowed: at most model.classes, {classes}"
        )
    return Labels(source, tuple(sorted(known)), classes)


def _folder(path: str) -> str:
    return os.path.basename(os.path.dirname(path))
