"""Render an evaluation as a terminal table and as a self-contained HTML page."""

import base64
import io
from collections.abc import Iterator
from datetime import date
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ...data.image_io import tensor_to_images
from ..compressed import KIND, Compressed, curve_of
from ..methods import Method, Row
from ..metrics import as_saved
from ..runner import Evaluation
from . import plots
from .columns import COLUMNS, Column

SHOWN = ("best", "median", "worst")
SHOWN_PIXELS = 768  # pixels a side; of larger images the page shows the centre


def columns(metrics: dict[str, Any]) -> list[Column]:
    """The columns of all metrics that were measured on at least one image. metrics: content of metrics.json."""
    measured = [result["metrics"] for result in metrics["results"].values()]
    return [c for c in COLUMNS if any(c.key in row and row[c.key]["n"] for row in measured)]


def best(metrics: dict[str, Any], column: Column) -> str | None:
    """The best value of a column as printed, so that rows that print the same value all count as best.

    None for a column without values or without a better direction.
    """
    values = [result["metrics"][column.key]["mean"] for result in metrics["results"].values()]
    values = [value for value in values if value is not None]
    if not values or not column.better:
        return None
    return column.text(max(values) if column.better == "up" else min(values))


def plain_table(metrics: dict[str, Any]) -> str:
    """The table for the terminal: one line per row with its means over the images, then the notes."""
    shown = columns(metrics)
    heads = [f"{c.label} {c.arrow}".strip() for c in shown]
    names = {key: f"{r['name']}, {r['detail']}" for key, r in metrics["results"].items()}
    width = max(map(len, names.values()))
    lines = [" " * width + "".join(f"  {head:>9}" for head in heads)]
    for key, result in metrics["results"].items():
        cells = (
            f"  {c.text(result['metrics'][c.key]['mean']):>{max(9, len(head))}}"
            for c, head in zip(shown, heads, strict=True)
        )
        lines.append(f"{names[key]:<{width}}" + "".join(cells))
    return "\n".join([*lines, *(f"note: {note}" for note in metrics["notes"])])


def render(metrics: dict[str, Any], evaluation: Evaluation) -> str:
    """Render the report as one HTML page that contains its style, script, plots and images.

    metrics: content of metrics.json. evaluation: the one it comes from; it reproduces the shown images once more.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown, (column, leader) = columns(metrics), _ranking(metrics)
    models = {
        name: {
            **about,
            **metrics["latents"][name],
            **_kurtosis(metrics["latents"][name]),
            "colour": plots.colour(i),
        }
        for i, (name, about) in enumerate(metrics["models"].items())
    }
    return environment.get_template("report.html").render(
        metrics=metrics,
        columns=shown,
        best={c.key: best(metrics, c) for c in shown},
        models=models,
        figures=list(_figures(metrics, evaluation, leader)),
        leader=leader,
        measure=column.label,
        plots={name: Markup(svg) for name, svg in _plots(metrics, evaluation).items()},
        today=date.today().isoformat(),
    )


def _kurtosis(latents: dict[str, Any]) -> dict[str, float | None]:
    """The smallest and the largest kurtosis of the channels; constant channels have none."""
    values = [value for value in latents["kurtosis"] if value is not None and np.isfinite(value)]
    return {"least_kurtosis": min(values, default=None), "largest_kurtosis": max(values, default=None)}


# -------------------------------------------------------------------- pictures


def _ranking(metrics: dict[str, Any]) -> tuple[Column, str]:
    """(column, row key) by which images are ranked: LPIPS if measured, else PSNR, of the model best by it."""
    name = "lpips" if metrics["settings"]["lpips"] else "psnr"
    rows = {key: row for key, row in metrics["results"].items() if row["latents"] == "mode"}
    sign = 1 if name == "lpips" else -1
    leader = min(rows, key=lambda key: sign * rows[key]["metrics"][name]["mean"])
    return next(c for c in COLUMNS if c.key == name), leader


def _figures(metrics: dict[str, Any], evaluation: Evaluation, key: str) -> Iterator[dict[str, Any]]:
    """Yield the best, the median and the worst image of the row `key`, each as reproduced by all methods."""
    column, _ = _ranking(metrics)
    many_types = len({row.dtype for row in evaluation.rows if row.dtype}) > 1
    order = sorted(evaluation.records, key=lambda record: record["values"][key][column.key])
    order = order if column.better == "down" else order[::-1]
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    numbers, methods = set(), _shown_methods(evaluation)
    for title in SHOWN:
        record = order[places[title]]
        if record["number"] in numbers:  # one or two images fill several of these places
            continue
        numbers.add(record["number"])
        photograph = evaluation.photographs[record["number"]]
        choices = []
        for reproduction in evaluation.reproductions([photograph], methods):
            row = reproduction.row
            values = record["values"][row.key]
            choices.append(
                {
                    "first": row.key == key,
                    "label": _label(row, many_types),
                    "values": [  # with non-breaking spaces
                        f"{c.label} {c.text(values[c.key])} {c.unit}".strip().replace(" ", "\u00a0")
                        for c in COLUMNS
                        if c.key in ("psnr", "ssim", "lpips") and c.key in values
                    ],
                    "source": _data_uri(as_saved(reproduction.images)),
                }
            )
        original = _centre_crop(photograph.image)
        yield {
            "title": title,
            "name": record["name"],
            "width": original.shape[3],
            "height": original.shape[2],
            "original": _data_uri(original),
            "choices": choices,
        }


def _label(row: Row, many_types: bool) -> str:
    if row.kind == "model":
        return f"{row.name} {row.detail if many_types else row.latents or ''}".strip()
    return f"{row.name}, {row.detail}" if row.kind == KIND else row.name


def _shown_methods(evaluation: Evaluation) -> list[Method]:
    """The methods whose images the page shows, codecs at their middle quality alone."""
    return [
        method.at_middle_quality() if isinstance(method, Compressed) else method
        for method in evaluation.methods
    ]


def _centre_crop(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top, left = max(height - SHOWN_PIXELS, 0) // 2, max(width - SHOWN_PIXELS, 0) // 2
    return images[:, :, top : top + SHOWN_PIXELS, left : left + SHOWN_PIXELS]


def _data_uri(images: Tensor) -> str:
    """Image (1, 3, H, W) -> data URI of its centre as lossless WebP."""
    picture: Image.Image = tensor_to_images(_centre_crop(images))[0]
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# -------------------------------------------------------------------- plots


def _plots(metrics: dict[str, Any], evaluation: Evaluation) -> dict[str, str]:
    latents = metrics["latents"]
    drawn = {name: plots.SERIES[i % len(plots.SERIES)] for i, name in enumerate(latents)}
    studies = {name: summary["study"] for name, summary in latents.items()}
    normal = np.linspace(-5, 5, 101)
    bell = (normal, np.exp(-(normal**2) / 2) / np.sqrt(2 * np.pi))
    found = {
        f"dots_{c.key}": plots.rows_of_dots(
            _dot_rows(evaluation, drawn, c.key), f"{c.label} {c.unit}".strip()
        )
        for c in columns(metrics)
        if c.key in ("psnr", "ssim", "lpips")
    }
    found["latents"] = plots.histogram(
        {drawn[name]: tuple(study["histogram"].values()) for name, study in studies.items()},
        "latent, in deviations of its channel",
        quiet=[bell],
    )
    found["logvar"] = plots.histogram(
        {drawn[name]: tuple(summary["logvar_histogram"].values()) for name, summary in latents.items()},
        "logvar",
    )
    spectra = {drawn[name]: summary["spectrum"] for name, summary in latents.items()}
    images = metrics["images"]["spectrum"]
    found["spectrum"] = plots.log_log(
        [(c, (s["frequency"], s["power"])) for c, s in spectra.items() if s["power"]],
        "frequency, 1 = Nyquist",
        "power, mean 1",
        quiet=[(images["frequency"], images["power"])] if images["power"] else [],
    )
    for key in ("psnr", "psnr_to_noiseless"):
        curves = [(drawn[name], (s["noise"]["sigma"], s["noise"][key])) for name, s in studies.items()]
        found[f"noise_{key}"] = plots.lines(
            curves, "noise, in deviations of the latents", "PSNR (dB)", markers=True
        )
    found |= _diffusability_plots(studies, drawn)
    paths = {name: s["path"]["lpips_of_steps"] for name, s in studies.items() if s["path"]}
    if paths:
        steps = {n: (np.arange(len(v)) + 0.5) / len(v) for n, v in paths.items()}
        curves = [(drawn[name], (steps[name], values)) for name, values in paths.items()]
        found["path"] = plots.lines(curves, "place on the path", "LPIPS of a step", markers=True)
    return found | _rate_plots(metrics, drawn)


def _rate_plots(metrics: dict[str, Any], drawn: dict[str, str]) -> dict[str, str]:
    """PSNR, MS-SSIM and LPIPS of the codecs over bits per pixel; metrics without a value are left out."""
    rows = [row for row in metrics["results"].values() if row["kind"] == KIND]
    colours = {curve_of(name): colour for name, colour in drawn.items()}
    found = {}
    for column in (c for c in COLUMNS if c.key in ("psnr", "ms_ssim", "lpips")):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            point = [row["metrics"][key]["mean"] for key in ("bits_per_pixel", column.key)]
            if point[1] is not None:
                curves.setdefault(row["name"], []).append(tuple(point))
        if curves:
            found[f"rate_{column.key}"] = plots.rates(
                [(name, colours.get(name, plots.QUIET), sorted(points)) for name, points in curves.items()],
                f"{column.label} {column.unit}".strip(),
            )
    return found


def _diffusability_plots(studies: dict[str, dict[str, Any]], drawn: dict[str, str]) -> dict[str, str]:
    """LPIPS over noise, PSNR and LPIPS over scale; metrics without a value are left out."""
    found = {}
    for plot, study, x, key, y in (
        ("noise_lpips", "noise", "sigma", "lpips", "LPIPS"),
        ("scale_psnr", "scale", "scale", "psnr", "PSNR (dB)"),
        ("scale_lpips", "scale", "scale", "lpips", "LPIPS"),
    ):
        of_models = {
            name: s[study] for name, s in studies.items() if any(v is not None for v in s[study][key])
        }
        if of_models:
            found[plot] = plots.lines(
                [(drawn[name], (s[x], s[key])) for name, s in of_models.items()],
                "noise, in deviations of the latents" if study == "noise" else "scale",
                y,
                quiet=[
                    (s[x], np.asarray(s[f"{key}_encoded"], dtype=float))
                    for s in of_models.values()
                    if study == "scale"
                ],
                markers=True,
            )
    return found


def _dot_rows(evaluation: Evaluation, drawn: dict[str, str], name: str) -> list[tuple[str, str, list[float]]]:
    """(name, colour, values of the metric `name` on all images) of each row shown as dots.

    These are the baselines and, of each model, its first row in its first type.
    """
    rows = [row for row in evaluation.rows if row.kind == "baseline" or row.key in evaluation.latents_of_row]
    return [
        (row.name, drawn.get(row.name, plots.QUIET), [r["values"][row.key][name] for r in evaluation.records])
        for row in rows
    ]
