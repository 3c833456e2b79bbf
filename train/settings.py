"""Sections of a configuration: frozen pydantic dataclasses whose keys have bounds and a line of documentation."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

Section = TypeVar("Section")
# Strict types for the values of a list: no text for a number, no number for text.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


@dataclass_transform(frozen_default=True)  # type checkers know the arguments of a section
def section(cls: type[Section]) -> type[Section]:
    """Make a class a section: its annotated names are the keys; creating it with a wrong or unknown key raises.

    The error is pydantic's ValidationError, a ValueError.
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)
    return made


def key(
    default: Any, doc: str, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> Any:
    """A key of a section: its default (`...`: the key is required) and a line of documentation for `--keys`.

    Values are checked strictly: no text for a number, no number for a truth value. A value must be >= low, > above
    and <= high, of these the ones that are given. Bounds for the values of a list belong to its type:
    tuple[Annotated[Whole, Field(ge=1)], ...].
    """
    return Field(default, strict=True, ge=low, gt=above, le=high, description=doc)


def choice(default: str | int | None, doc: str) -> Any:
    """A key whose type is a Literal, the words or numbers that are allowed; `doc` is a line for `--keys`."""
    return Field(default, description=doc)


def _no_is_text(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false


OrNo = BeforeValidator(_no_is_text)
Precision = Annotated[Literal["no", "bf16", "fp16"], OrNo]
Recomputed = Annotated[Literal["no", "norms", "blocks"], OrNo]
LPIPSNet = Literal["vgg", "alex", "squeeze"]
