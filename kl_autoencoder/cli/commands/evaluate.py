"""evaluate: measure models on photographs, then write metrics.json, images.csv and report.html."""

import argparse
import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ... import distributed
from ...data.locating import locate
from ...extras import require
from ...files import replacing
from ...progress import Progress
from ..parser import DTYPES, IMAGES, MODEL, Command, Parser, add_device, add_json, add_output, positive
from ..paths import MODELS, OTHERS, check_model, refuse_existing
from .codec import quality

if TYPE_CHECKING:
    from ...evaluation.compressed import Compressed
    from ...evaluation.methods import Model
    from ...evaluation.other_autoencoders import OtherAutoencoder
    from ...evaluation.runner import Evaluation

FURTHER_METRICS = ("dists", "vif")  # as in evaluation/further_metrics.py, which would import torch
# written in this order: if the last exists, all do
REPORT_FILES = ("images.csv", "report.html", "metrics.json")


def evaluate_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        metavar="MODEL",
        help=MODEL + "; or a folder or hub id of "
        "another autoencoder of diffusers (AutoencoderTiny, AutoencoderDC ...); may be repeated",
    )
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="a folder, parquet or .tar files, or a data set's hub id",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=_size, default=256, metavar="N",
        help="scale the short side to N, crop the centre (256), or native",
    )  # fmt: skip
    add_output(parser, "FOLDER", "where to write the report")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="one or more, side by side (float32)"
    )
    parser.add_argument(
        "--lpips", choices=["alex", "squeeze", "vgg"], default="alex", help="its network (alex)"
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=FURTHER_METRICS, default=[], metavar="NAME",
        help=f"measure these too: {', '.join(FURTHER_METRICS)} (pip install 'kl-autoencoder[metrics]')",
    )  # fmt: skip
    parser.add_argument(
        "--study-images", type=positive, default=8, metavar="N", help="images for the studies of latents (8)"
    )
    parser.add_argument(
        "--save-images", action="store_true", help="write what was measured as PNG files, too"
    )
    parser.add_argument(
        "--codec", nargs="*", type=quality, metavar="QUALITY",
        help="the models as codecs, too, beside JPEG, WebP and AVIF in the same bytes (30 40 50 60 70)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N", help="images at a time (4)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of samples and noise; image i draws with seed + i (0)"
    )
    parser.add_argument(
        "--image-column", default="image", metavar="COLUMN", help="with the photographs (image)"
    )
    parser.add_argument(
        "--split", default="validation", help="the split of a data set on the hub (validation)"
    )
    add_device(parser)
    add_json(parser)


def _size(text: str) -> int | None:
    """Type of an option: pixels, or None for "native"."""
    return None if text == "native" else positive(text)


def check_evaluate(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path."""
    require("eval")
    if arguments.codec is not None:
        require("codec")
    if arguments.metrics:
        require("metrics")
    arguments.output = Path(arguments.output)
    if arguments.output.is_file():
        raise ValueError(f"{arguments.output}: is a file; a folder is written")
    refuse_existing([arguments.output / name for name in reversed(REPORT_FILES)], [], arguments.overwrite)
    for model in arguments.model:
        check_model(model, (*MODELS, *OTHERS))
    locate(arguments.data, "--data", "validation")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure models on images, on any number of ranks; rank 0 writes the report at the end."""
    from ...evaluation.report import html

    place = distributed.join(arguments.device)
    unfinished = arguments.output.absolute()
    unfinished = unfinished.with_name(f".{unfinished.name}.unfinished")
    try:
        if place.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
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


def _measured(arguments: argparse.Namespace, images: Path) -> tuple["Evaluation", dict[str, Any]]:
    """Measure this rank's share and combine the results of all ranks: the evaluation and metrics.json's content.

    images: the folder for the measured images, with --save-images.
    """
    import torch

    from ...data.image_dataset import Photographs
    from ...evaluation.methods import baselines_of, short_names
    from ...evaluation.runner import Evaluation, MetricSuite

    names, place = short_names(arguments.model), distributed.join(arguments.device)
    # with several processes, each has a device of its own
    device = place.device if place.num_processes > 1 else torch.device(arguments.device or place.device)
    with distributed.failing_together():
        photographs = Photographs.open(
            arguments.data, arguments.size, arguments.image_column, arguments.split, arguments.limit
        )
        models = [
            _load(name, given, str(device), dtype, arguments.seed)
            for name, given in zip(names, arguments.model, strict=True)
            for dtype in dict.fromkeys(arguments.dtype)
        ]
    suite = MetricSuite.load(arguments.lpips, device, place.is_main_process, arguments.metrics)
    methods = [*models, *baselines_of(models), *_codecs(models, arguments.codec)]
    evaluation = Evaluation(photographs, methods, suite)
    evaluation.measure(arguments.batch_size, images if arguments.save_images else None)
    latents = evaluation.study(arguments.study_images, arguments.seed)
    return evaluation, _metrics(
        arguments, evaluation, dict(zip(names, arguments.model, strict=True)), latents
    )


def _codecs(models: list["Model | OtherAutoencoder"], qualities: list[int] | None) -> list["Compressed"]:
    """The codec of each of our models in its first type; none if `qualities` is None, the default ones if it is [].

    Raises ValueError if none of the models is ours.
    """
    if qualities is None:
        return []
    from ...evaluation.compressed import QUALITIES, Compressed
    from ...evaluation.methods import Model

    first = {model.name: model for model in reversed(models) if isinstance(model, Model)}
    if not first:
        raise ValueError("--codec: none of the models has one; allowed: with a model that `compress` takes")
    return [Compressed(model, qualities or QUALITIES) for model in reversed(first.values())]


def _load(name: str, given: str, device: str, dtype: str | None, seed: int) -> "Model | OtherAutoencoder":
    """Load the model `given` on the command line, one of ours or another autoencoder of diffusers, as a method."""
    from ...evaluation.methods import Model
    from ...evaluation.other_autoencoders import OtherAutoencoder
    from ..loading import load_model, load_other_model, other_kind

    if kind := other_kind(given):
        return OtherAutoencoder(name, load_other_model(given, kind, device, dtype), seed)
    vae = load_model(given, device, dtype)
    own = vae.config.get("bottleneck") is None
    return Model(name, vae, seed) if own else OtherAutoencoder(name, vae, seed)


def _metrics(
    arguments: argparse.Namespace, evaluation: "Evaluation", given: dict[str, str], latents: dict[str, Any]
) -> dict[str, Any]:
    """The content of metrics.json; it does not depend on the number of processes.

    given: short name -> the model as given on the command line. latents: of `Evaluation.study`.
    """
    from ...evaluation.other_autoencoders import OtherAutoencoder
    from ...evaluation.runner import FORMAT, STUDY_SIZE

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
            "lpips": arguments.lpips if evaluation.suite.lpips else None,
            "study_size": photographs.size or STUDY_SIZE,
            "study_images": evaluation.study_numbers(arguments.study_images),
        },
        "notes": evaluation.suite.notes,
        "models": {model.name: _about(model, given[model.name]) for model in evaluation.models},
        "others": {
            method.name: {"model": given[method.name], "class": type(method.vae).__name__, **_shape(method)}
            for method in evaluation.methods
            if isinstance(method, OtherAutoencoder)
        },
        "results": evaluation.results(),
        "latents": latents,
        "images": {"spectrum": evaluation.spectrum.summary()},
    }
    return _for_json(metrics)


def _about(model: "Model", given: str) -> dict[str, Any]:
    return {"model": given, **_shape(model), "scaling_factor": model.vae.scaling["scaling_factor"]}


def _shape(model: "Model | OtherAutoencoder") -> dict[str, int]:
    return {
        "downsampling": model.downsampling,
        "latent_channels": model.latent_channels,
        "parameters": sum(parameter.numel() for parameter in model.vae.parameters()),
    }


def _for_json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None, in nested dicts and sequences."""
    if isinstance(value, dict):
        return {key: _for_json(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_for_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(output: Path, metrics: dict[str, Any], evaluation: "Evaluation") -> None:
    """Write `REPORT_FILES` into the folder `output`."""
    from ...evaluation.report import html

    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / REPORT_FILES[0]) as path, open(path, "w", newline="", encoding="utf-8") as file:
        _write_csv(file, metrics, evaluation.records)
    page = html.render(metrics, evaluation)
    with replacing(output / REPORT_FILES[1]) as path:
        path.write_text(page, encoding="utf-8")
    with replacing(output / REPORT_FILES[2]) as path:
        path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _move(unfinished: Path, output: Path) -> None:
    """Rename the folder `unfinished` to `output`; if that exists, move all files into it, metrics.json last."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        os.replace(unfinished, output)
        return
    files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == REPORT_FILES[-1]):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / path, output / path)


def _write_csv(file: TextIO, metrics: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write one row per image, with each metric of each method that was measured on at least one image."""
    from ...evaluation.runner import IMAGE_METRICS

    columns = [
        (key, name)
        for key, result in metrics["results"].items()
        for name in (*IMAGE_METRICS, *FURTHER_METRICS)
        if result["metrics"].get(name, {"n": 0})["n"]
    ]
    writer = csv.writer(file)
    writer.writerow(["number", "name", "height", "width", *(f"{key}:{name}" for key, name in columns)])
    for record in records:
        about = [record[name] for name in ("number", "name", "height", "width")]
        writer.writerow([*about, *(record["values"][key].get(name, "") for key, name in columns)])


COMMANDS = {
    "evaluate": Command(
        "measure models on photographs: metrics.json, images.csv and report.html",
        evaluate_arguments,
        check_evaluate,
        evaluate,
        description="Measures how well models reproduce photographs, beside bicubic, JPEG and WebP, and what their "
        "latents are like. On several processes with `accelerate launch -m kl_autoencoder evaluate ...`.",
        epilog=IMAGES,
        on_ranks=True,
    ),
}
