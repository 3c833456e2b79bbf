"""Sections of a configuration: frozen pydantic dataclasses whose keys have bounds and a sentence."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

Section = TypeVar("Section")
Whole = Annotated[int, Field(strict=True)]  # of the values of a list
Number = Annotated[float, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


@dataclass_transform(frozen_default=True)  # type checkers know the arguments of a section
def section(cls: type[Section]) -> type[Section]:
    """Make a class a section: its annotated names are keys, its __init__ refuses what they do not allow."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)
    return made


def key(
    default: Any, doc: str, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> Any:
    """A key of a section with its default (`...`: it must be given) and a sentence for `--keys`.

    Strict: no text for a number, no number for a truth value. The value must be >= low, > above and <= high, those
    that are given. The bounds of a list's values are part of its type: tuple[Annotated[Whole, Field(ge=1)], ...].
    """
    return Field(default, strict=True, ge=low, gt=above, le=high, description=doc)


def choice(default: str | int | None, doc: str) -> Any:
    """A key that is one of the words, or numbers, of its Literal type."""
    return Field(default, description=doc)


def _no_is_text(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false


OrNo = BeforeValidator(_no_is_text)
Precision = Annotated[Literal["no", "bf16", "fp16"], OrNo]
Recomputed = Annotated[Literal["no", "norms", "blocks"], OrNo]
LPIPSNet = Literal["vgg", "alex", "squeeze"]
