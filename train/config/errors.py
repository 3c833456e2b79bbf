"""Turn pydantic's errors into one line: the key, the value and what is allowed."""

import dataclasses
import difflib
import reprlib
import textwrap
import types
import typing
from typing import Any

from pydantic import BeforeValidator, ValidationError

TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "keys and values",
    "dataclass_exact_type": "keys and values",
    "finite_number": "a finite number",
}
OPTIONS = ("constrained-int", "tuple[")  # starts of the types that pydantic inserts into the path of an error
BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"))
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60
_shorten.maxlevel = 2


def first_error(error: ValidationError, cls: type, prefix: str = "") -> str:
    """Describe the first of the errors in one line.

    cls: the section that was to be built. prefix: the key of this section, with a dot at its end, or "".
    """
    found = _of_the_kind_given(error.errors(include_url=False))
    kind, path, value = found["type"], _without_options(found["loc"]), found["input"]
    key = prefix + dotted(path)
    if kind == "value_error":  # raised by a section's own check, whose message is complete
        return str(found["ctx"]["error"])
    if kind == "unexpected_keyword_argument":
        return f"{key}: no such key; {_near(path, section_at(cls, path[:-1]), prefix)}"
    if kind == "missing":
        return f"{key}: not given, and it has no default"
    if kind in TYPES:
        return f"{key}: {_shown(value)}; allowed: {TYPES[kind]}"
    if kind == "literal_error":
        allowed = ", ".join(map(str, typing.get_args(_literal(_field(cls, path).annotation))))
        return f"{key}: {_shown(value)}; allowed: {allowed}"
    bounds = bounds_of(cls, path)
    if bounds:
        value = (
            float(value) if isinstance(value, int) and float in kinds(_field(cls, path).annotation) else value
        )
        return f"{key}: {_shown(value)}; allowed: {' and '.join(bounds)}"
    return f"{key}: {_shown(value)}; {found['msg']}"


def _of_the_kind_given(errors: list) -> Any:
    """The first error; if its key may be a value or a list, and a list was given, the error inside of the list."""
    key = _without_options(errors[0]["loc"])
    same = [error for error in errors if _without_options(error["loc"])[: len(key)] == key]
    return max(same, key=lambda error: len(error["loc"]))


def _without_options(path: tuple) -> list:
    """A path without the types that pydantic inserts for a union: ("side", "constrained-int") -> ["side"]."""
    return [part for part in path if not (isinstance(part, str) and part.startswith(OPTIONS))]


def dotted(path: list) -> str:
    """Write a path as people write keys: ["model", "block_out_channels", 1] -> "model.block_out_channels[1]"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{textwrap.shorten(part, 60)}" for part in path)
    return "".join(parts).removeprefix(".")


def section_at(cls: type, path: list) -> type:
    """The section class at the end of `path`, a list of keys that starts in `cls`."""
    for name in path:
        cls = next(
            kind for kind in kinds(cls.__pydantic_fields__[name].annotation) if dataclasses.is_dataclass(kind)
        )
    return cls


def kinds(annotation: Any) -> list:
    """The types that an annotation allows: float | None -> [float, NoneType]; tuple[int, ...] -> [int]."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return [kind for part in typing.get_args(annotation) for kind in kinds(part)]
    return [annotation]


def bounds_of(cls: type, path: list) -> list[str]:
    """The bounds of the key, or the list's value, at `path` in `cls`, such as ["at least 0", "at most 1"]."""
    field = _field(cls, path)
    in_a_list = bool(path) and isinstance(path[-1], int)
    types = _items(field.annotation) if in_a_list else typing.get_args(field.annotation)
    metadata = [m for item in types for m in getattr(item, "__metadata__", ())]
    metadata = [inner for m in metadata for inner in getattr(m, "metadata", [m])]
    metadata += [] if in_a_list else field.metadata
    return [
        f"{word} {_number(getattr(bound, name))}"
        for name, word in BOUNDS
        for bound in metadata
        if getattr(bound, name, None) is not None
    ]


def _field(cls: type, path: list):
    names = [name for name in path if not isinstance(name, int)]
    return section_at(cls, names[:-1]).__pydantic_fields__[names[-1]]


def _literal(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Literal:
        return annotation
    found = (
        _literal(option) for option in typing.get_args(annotation) if not isinstance(option, BeforeValidator)
    )
    return next((literal for literal in found if literal is not None), None)


def _items(annotation: Any) -> list:
    """The types of the values of the lists that an annotation allows."""
    if typing.get_origin(annotation) is tuple:
        return [typing.get_args(annotation)[0]]
    return [item for option in typing.get_args(annotation) for item in _items(option)]


def _near(path: list, cls: type, prefix: str) -> str:
    names = list(cls.__pydantic_fields__)
    near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
    return (
        f"did you mean {prefix}{dotted([*path[:-1], near[0]])}?" if near else f"allowed: {', '.join(names)}"
    )


def _number(value: float) -> str:
    return f"{value:,g}" if isinstance(value, float) else f"{value:,}"


def _shown(value: Any) -> str:
    """A value as an error shows it, shortened if it is long."""
    if isinstance(value, int) and abs(value) > 10**40:  # repr raises for more than 4300 digits
        return f"a whole number of {value.bit_length()} bits"
    return _shorten.repr(list(value) if isinstance(value, tuple) else value)
