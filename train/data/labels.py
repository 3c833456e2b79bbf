"""Class labels of images as numbers, from a column of the source or from the folders that its files lie in."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kl_autoencoder.data.file_streams import Stream
from kl_autoencoder.data.sources import Rows, column_values, image_names


class ClassOutOfRange(ValueError):
    """Raised for a class number out of range, which ends the run (an unreadable image is only skipped)."""


class Source(NamedTuple):
    """Where the labels of a source come from: its column `label_column`, or if `folders` the folders of its files.

    With None and False the images have no classes. name: the source, for messages.
    """

    name: str
    image_column: str
    label_column: str | None
    folders: bool

    @property
    def key(self) -> str:
        """The configuration key that asks for labels, with which error messages begin."""
        return "data.labels" if self.label_column is None else "data.label_column"


@dataclass(frozen=True)
class Labels:
    """Gives the number of a record's class: `labels(record)`, a whole number from 0 on.

    names: the names of the classes, sorted; the number of a class is its index. None if labels are numbers already.
    classes: the number of classes that the network knows; None for any.
    """

    source: Source
    names: tuple[str, ...] | None
    classes: int | None

    def __call__(self, record: dict) -> int:
        """The class number of a record {"path", "columns": its row}.

        Raises ValueError for a record without label and for a name that is not in `names`, ClassOutOfRange as in
        `in_range`.
        """
        column = self.source.label_column
        label = _folder_name(record["path"]) if column is None else record["columns"][column]
        if label is None:
            raise ValueError("no label")
        if self.names is None:
            return self.in_range(label)
        if label not in self.names:
            raise ValueError(f"class {label!r} is none of the {len(self.names)} of data.train")
        return self.names.index(label)

    def in_range(self, label: Any) -> int:
        """Return a label that is a number already. Raises ClassOutOfRange unless it is an int in [0, classes)."""
        top = "on" if self.classes is None else f"to {self.classes - 1} (model.classes={self.classes})"
        if not isinstance(label, int) or label < 0 or (self.classes is not None and label >= self.classes):
            raise ClassOutOfRange(f"{self.source.key}: {label!r}; allowed: whole numbers from 0 {top}")
        return int(label)


def labels_of_rows(source: Source, images: Rows, classes: int | None) -> Labels | None:
    """Read and check all labels of a source that is read by row number; None where images have no classes.

    Raises ValueError, naming the key, if there are no labels, if they are neither names nor numbers in [0,
    classes), if there are more names than `classes`, and if classes are to be folders but images have no paths.
    """
    if source.label_column is not None:
        return _labels_from_values(source, column_values(images, source.label_column), classes)
    if not source.folders:
        return None
    paths = image_names(images, source.image_column)
    if None in paths:
        raise ValueError(f"data.labels: folders, but images of {source.name} have no paths; allowed: null")
    return _labels_from_values(source, [_folder_name(path) for path in paths], classes)


def labels_of_stream(source: Source, stream: Stream, classes: int | None) -> Labels | None:
    """Read and check all labels of a stream, as in `labels_of_rows`; classes cannot be folders.

    If labels cannot be read without the images, each is checked when its sample is read. They then have to be
    numbers, since names can be numbered only once all are known.
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
    return _labels_from_values(source, values, classes)


def _labels_from_values(source: Source, values: Sequence[Any], classes: int | None) -> Labels:
    """Number the names among all labels of a source, or check that all labels are numbers in range."""
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


def _folder_name(path: str) -> str:
    return os.path.basename(os.path.dirname(path))
