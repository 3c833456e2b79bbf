"""List every key of a configuration with its type, default, range and documentation, for `--keys`."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..parts.registry import SORTS, Parts
from .autoencoder import AutoencoderConfig
from .errors import bounds_of, dotted, kinds
from .run import Config
from .tasks import TASKS

NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
WIDTH = 100  # columns to which the documentation is wrapped


class Key(NamedTuple):
    """A key as `--keys` prints it: its dotted name, such as optimizer.learning_rate, and words about it."""

    name: str
    type: str
    default: str
    range: str
    doc: str


def keys(cls: type = AutoencoderConfig, path: tuple[str, ...] = ()) -> Iterator[Key]:
    """Yield the keys of a section and of the sections in it, in the order of the code; `path` leads to it."""
    for name, field in cls.__pydantic_fields__.items():
        inner = next((kind for kind in kinds(field.annotation) if dataclasses.is_dataclass(kind)), None)
        here = (*path, name)
        if inner is not None:
            yield from keys(inner, here)
            continue
        parts = SORTS.get(".".join(here))
        if parts is not None:
            yield from _kinds_of(parts, field)
            continue
        default = "must be given" if field.is_required() else _shown(field.default)
        bounds = " and ".join(bounds_of(cls, [name]) or bounds_of(cls, [name, 0]))
        yield Key(dotted(list(here)), type_name(field.annotation), default, bounds, field.description or "")


def _kinds_of(parts: Parts, field) -> Iterator[Key]:
    """Yield the key `kind` of a part, then the keys of each kind; their documentation starts with the kind."""
    default = getattr(field.default, "kind", "none")
    yield Key(f"{parts.key}.kind", " | ".join(parts.kinds), default, "", field.description or "")
    for kind, (section, _) in parts.kinds.items():
        for key in keys(section, tuple(parts.key.split("."))):
            if not key.name.endswith(".kind"):
                yield key._replace(doc=f"{kind}: {key.doc}")


def describe() -> str:
    """The text of `--keys`: first the keys of every run, then those that each task adds."""
    shared = [key._replace(type=" | ".join(TASKS)) if key.name == "task" else key for key in keys(Config)]
    lines, names = _lines(shared), {key.name for key in shared}
    for task, cls in TASKS.items():
        own = _lines(key for key in keys(cls) if key.name not in names)
        lines += ["", f"With task: {task}", "", *own]
    return "\n".join(lines)


def _lines(described: Iterable[Key]) -> list[str]:
    lines = []
    for key in described:
        about = ", ".join(filter(None, [key.type, key.range, f"default {key.default}"]))
        lines.append(f"{key.name}: {about}")
        lines += textwrap.wrap(key.doc, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def type_name(annotation: Any) -> str:
    """A type in words: tuple[int, ...] | None -> "list of whole number or null"."""
    if typing.get_origin(annotation) is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    options = typing.get_args(annotation)
    if options:
        given = [type_name(option) for option in options if option is not type(None)]
        return " or ".join(given) + (" or null" if type(None) in options else "")
    return NAMES.get(annotation, str(annotation))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
