"""The command `evaluate`: measure, then write metrics.json, images.csv and report.html."""

import argparse
import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..data.image_dataset import Photographs
from ..evaluation.methods import Model, baselines_of, short_names
from ..evaluation.report import html
from ..evaluation.runner import FORMAT, PER_IMAGE, STUDY_SIZE, Evaluation, Instruments
from ..files import replacing
from ..progress import Progress
from .loading import load_model

LAST = "metrics.json"  # of the files to appear: where it is, all are


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure models on images, on any number of ranks, and write it all at the end, from rank 0."""
    place = distributed.join(arguments.device)
    unfinished = arguments.output.absolute()
    unfinished = unfinished.with_name(f".{unfinished.name}.unfinished")
    try:
        if place.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        evaluation, metrics = _measured(arguments, unfinished / "images")
        if place.is_main_process:
            with Progress("writing the report"):
                _write(unfinished, metrics, evaluation)
                _move(unfinished, arguments.output)
            if arguments.json:
                print(json.dumps(metrics, indent=1, allow_nan=False))
            else:
                print(html.plain_table(metrics))
                print(f"{arguments.output / 'report.html'}: {len(evaluation.records)} images")
        place.destroy_process_group()
    finally:
        if place.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


def _measured(arguments: argparse.Namespace, images: Path) -> tuple[Evaluation, dict[str, Any]]:
    """Every rank's part of the work, and then what all have found; `images`: a folder for those, if wanted."""
    names, place = short_names(arguments.model), distributed.join(arguments.device)
    # of several processes each has a device of its own
    device = place.device if place.num_processes > 1 else torch.device(arguments.device or place.device)
    with distributed.failing_together():
        photographs = Photographs.open(
            arguments.data, arguments.size, arguments.image_column, arguments.split, arguments.limit
        )
        models = [
            Model(name, load_model(given, str(device), dtype), arguments.seed)
            for name, given in zip(names, arguments.model, strict=True)
            for dtype in dict.fromkeys(arguments.dtype)
        ]
    tools = Instruments.find(arguments.lpips, device, place.is_main_process)
    evaluation = Evaluation(photographs, [*models, *baselines_of(models)], tools)
    evaluation.measure(arguments.batch_size, images if arguments.save_images else None)
    latents = evaluation.study(arguments.study_images, arguments.seed)
    return evaluation, _metrics(
        arguments, evaluation, dict(zip(names, arguments.model, strict=True)), latents
    )


def _metrics(
    arguments: argparse.Namespace, evaluation: Evaluation, given: dict[str, str], latents: dict[str, Any]
) -> dict[str, Any]:
    """What metrics.json holds; the same whatever the number of processes."""
    photographs = evaluation.photographs
    metrics = {
        "format": FORMAT,
        "data": {
            "source": arguments.data,
            "rule": photographs.rule,
            "images": len(evaluation.records),
            "skipped": [{"number": n, "reason": why} for n, why in sorted(photographs.skipped.items())],
        },
        "settings": {
            "seed": arguments.seed,
            "lpips": arguments.lpips if evaluation.tools.lpips else None,
            "study_size": photographs.size or STUDY_SIZE,
            "study_images": evaluation.studied(arguments.study_images),
        },
        "notes": evaluation.tools.notes,
        "models": {model.name: _about(model, given[model.name]) for model in evaluation.models},
        "results": evaluation.results(),
        "latents": latents,
        "images": {"spectrum": evaluation.spectrum.summary()},
    }
    return _for_json(metrics)


def _about(model: Model, given: str) -> dict[str, Any]:
    config = model.vae.config
    return {
        "model": given,
        "downsampling": model.vae.downsampling,
        "latent_channels": config.latent_channels,
        "parameters": sum(parameter.numel() for parameter in model.vae.parameters()),
        "scaling_factor": config.scaling_factor,
    }


def _for_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _for_json(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_for_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(output: Path, metrics: dict[str, Any], evaluation: Evaluation) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "images.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        _write_csv(file, metrics, evaluation.records)
    page = html.render(metrics, evaluation)
    with replacing(output / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    with replacing(output / LAST) as path:
        path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _move(unfinished: Path, output: Path) -> None:
    """Give a folder, or where `output` is one already all files in it, the name `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        os.replace(unfinished, output)
        return
    files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == LAST):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / path, output / path)


def _write_csv(file, metrics: dict[str, Any], records: list[dict[str, Any]]) -> None:
    columns = [
        (key, name)
        for key, result in metrics["results"].items()
        for name in PER_IMAGE
        if result["metrics"][name]["n"]
    ]
    writer = csv.writer(file)
    writer.writerow(["number", "name", "height", "width", *(f"{key}:{name}" for key, name in columns)])
    for record in records:
        about = [record[name] for name in ("number", "name", "height", "width")]
        writer.writerow([*about, *(record["values"][key].get(name, "") for key, name in columns)])
