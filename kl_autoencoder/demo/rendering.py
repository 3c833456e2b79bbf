"""Render outcomes and pictures as HTML, with the divider and the table of the report of `evaluate`."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import jinja2
from torch import Tensor

from ..evaluation.report.columns import COLUMNS, Column
from .photographs import Photograph
from .reconstruction import Outcome

COLOURS = 3  # colours of models in demo.css
REPORT = "kl_autoencoder.evaluation.report"
COMPARED = (
    *(column for column in COLUMNS if column.key in ("psnr", "ssim", "lpips")),
    Column("kilobytes", "kB", "", 1),
    Column("encode_ms", "encode", "", 0, "ms"),
    Column("decode_ms", "decode", "", 0, "ms"),
    Column("megabytes", "memory", "", 0, "MB"),
)
OF_LATENTS = "Of a model, kB is its latents at 8 bits a value; JPEG and WebP get as many bytes."
OF_FILES = "kB is the whole file; JPEG and WebP get as many bytes."
Address = Callable[[Tensor], str]  # writes an image (1, 3, H, W) and returns its URL on the page


class Choice(NamedTuple):
    """An image for the right side of a divider.

    images: (1, 3, H, W) in [-1, 1]. values: metrics as text. shown: whether it is visible at first.
    """

    title: str
    detail: str
    images: Tensor
    values: Sequence[str] = ()
    shown: bool = True


def comparison(left: str, images: Tensor, choices: Sequence[Choice], address: Address) -> str:
    """Render dividers between an image (1, 3, H, W), labelled `left`, and others of its size, with controls."""
    original, (height, width) = address(images), images.shape[2:]
    figures = [
        {
            "title": c.title,
            "name": c.detail,
            "original": original,
            "width": width,
            "height": height,
            "shown": c.shown,
        }
        for c in choices
    ]
    shown = [
        {
            "source": address(c.images),
            "label": c.title,
            "values": [v.replace(" ", "\u00a0") for v in c.values],
        }
        for c in choices
    ]
    return _template("comparison.html").render(left=left, figures=figures, choices=shown)


def reconstructions(photograph: Photograph, outcomes: Sequence[Outcome], address: Address) -> str:
    """Render the photograph compared with each method's reproduction; at first only the models' are visible."""
    choices = [
        Choice(o.name, o.detail, o.images, [f"PSNR {o.values['psnr']:.2f} dB"], o.costs is not None)
        for o in outcomes
    ]
    return comparison("original", photograph.images, choices, address)


def table(photograph: Photograph, outcomes: Sequence[Outcome], about: str) -> str:
    """Render a table with one row per method; `about` explains the bytes in it."""
    rows = [_row(outcome, number) for number, outcome in enumerate(outcomes)]
    columns = [c for c in COMPARED if any(row["values"].get(c.key) is not None for row in rows)]
    best = {c.key: _best(c, [row["values"].get(c.key) for row in rows]) for c in columns if c.better}
    return _template("table.html").render(
        rows=rows, columns=columns, best=best, about=f"{_about(photograph)} {about}"
    )


def pictures(
    shown: Sequence[tuple[str, Tensor]], address: Address, text: str = "", pixels: bool = False
) -> str:
    """Render (caption, image (1, 3, h, w)) in rows, after `text`. pixels: enlarge without smoothing."""
    entries = [{"caption": caption, "source": address(images)} for caption, images in shown]
    return _template("pictures.html").render(pictures=entries, text=text, pixels=pixels)


def script() -> str:
    """The page's JavaScript: `klAutoencoder.compare(element)` sets up the comparison in an element."""
    parts = [_source("viewer.js"), _source("demo.js")]
    return "window.klAutoencoder = (() => {\n" + "\n".join(parts) + "\nreturn { compare };\n})();"


def style() -> str:
    """The page's CSS."""
    return "\n".join(map(_source, ("viewer.css", "results.css", "demo.css")))


def _row(outcome: Outcome, number: int) -> dict:
    costs = outcome.costs
    values: dict[str, float | None] = {**outcome.values, "kilobytes": outcome.bytes / 1000}
    if costs:
        peak = costs.peak_bytes
        values |= {"encode_ms": costs.encode_ms, "decode_ms": costs.decode_ms}
        values["megabytes"] = None if peak is None else peak / 1e6
    kind = "model" if costs else "baseline"
    return {
        "name": outcome.name,
        "detail": outcome.detail,
        "kind": kind,
        "colour": f"var(--c{number % COLOURS})" if costs else None,
        "values": values,
    }


def _best(column: Column, values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    return column.text(max(known) if column.better == "up" else min(known)) if len(known) > 1 else None


def _about(photograph: Photograph) -> str:
    (height, width), (rows, columns) = photograph.original_size, photograph.size
    if (height, width) == (rows, columns):
        return f"{photograph.name}, {width}x{height} pixels."
    return f"{photograph.name}, scaled from {width}x{height} to {columns}x{rows} pixels."


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(__package__), jinja2.PackageLoader(REPORT)]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def _source(name: str) -> str:
    return _environment().loader.get_source(_environment(), name)[0]  # type: ignore[union-attr]
