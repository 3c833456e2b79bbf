"""Checks of each command's arguments by names and small files alone, made before torch is imported.

Each function has a command's name, takes its parsed arguments and raises ValueError or OSError. What a name stands
for, such as the photographs in a folder, takes the name's place in the arguments.
"""

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.formats import LATENTS_KEY, check_writable
from ..data.locating import locate
from ..extras import require
from ..files import read_metadata
from .paths import (
    check_model,
    find_photographs,
    inside,
    model_folder,
    model_path,
    plan_targets,
    readable_folder,
    refuse_existing,
)

REPORT_FILES = ("metrics.json", "images.csv", "report.html")  # what evaluate writes


def encode(arguments: argparse.Namespace) -> None:
    """`photographs` become (path, name) pairs, `output` a Path."""
    arguments.photographs, arguments.output = find_photographs(arguments.photographs), Path(arguments.output)
    if arguments.output.suffix != ".safetensors":
        raise ValueError(f"{arguments.output}: latents are written to a .safetensors file")
    refuse_existing([arguments.output], [path for path, _ in arguments.photographs], arguments.overwrite)
    check_model(arguments.model)


def decode(arguments: argparse.Namespace) -> None:
    """Adds `targets`, a path for each photograph in the files."""
    names = [inside(name, path) for path in arguments.latents for name in _names_of_latents(path)]
    arguments.targets = plan_targets(arguments.output, names, single=len(names) == 1)
    refuse_existing(arguments.targets, arguments.latents, arguments.overwrite)
    if arguments.model:
        check_model(arguments.model)


def _names_of_latents(path: str) -> list[str]:
    try:
        return list(map(str, json.loads(read_metadata(path)[LATENTS_KEY])["names"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of latents written by save_latents or `encode`") from error


def reconstruct(arguments: argparse.Namespace) -> None:
    """`photographs` become (path, name) pairs; adds `targets`, a path for each."""
    single = len(arguments.photographs) == 1 and not Path(arguments.photographs[0]).is_dir()
    photographs = find_photographs(arguments.photographs)
    arguments.targets = plan_targets(arguments.output, [name for _, name in photographs], single)
    refuse_existing(arguments.targets, [path for path, _ in photographs], arguments.overwrite)
    check_model(arguments.model)
    arguments.photographs = photographs


def evaluate(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path."""
    require("eval")
    arguments.output = Path(arguments.output)
    if arguments.output.is_file():
        raise ValueError(f"{arguments.output}: is a file; a folder is written")
    refuse_existing([arguments.output / name for name in REPORT_FILES], [], arguments.overwrite)
    for model in arguments.model:
        check_model(model)
    locate(arguments.data, "--data", "validation")


def export(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path; adds `folder`, the model's, or None for a single file or a hub id."""
    check_model(arguments.model)
    source, output = model_path(arguments.model), Path(arguments.output)
    arguments.output, arguments.folder = output, readable_folder(source) if source.is_dir() else None
    if arguments.single_file:
        if output.suffix != ".safetensors":
            raise ValueError(f"{output}: a single file is written to a .safetensors file")
        inputs = arguments.folder.iterdir() if arguments.folder else [source]
        refuse_existing([output], list(inputs), arguments.overwrite)
    elif output.is_file():
        raise ValueError(f"{output}: is a file; without --single-file a folder is written")
    else:
        _refuse_folder(output, arguments.folder, arguments.overwrite)


def info(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)


def fp16_check(arguments: argparse.Namespace) -> None:
    """`images` become (path, name) pairs, none for the built-in ones; adds `folder`, the model's or None."""
    if arguments.fix != bool(arguments.output):
        raise ValueError("--fix and -o FOLDER belong together")
    if arguments.fix and arguments.json:
        raise ValueError("--json: prints what a check finds; allowed: without --fix")
    if not arguments.images:
        require("eval", "skimage")
    arguments.images = find_photographs([arguments.images] if arguments.images else [])
    check_model(arguments.model)
    source = model_path(arguments.model)
    arguments.folder = readable_folder(source) if source.is_dir() else None
    if arguments.fix:
        arguments.output = Path(arguments.output)
        _refuse_folder(arguments.output, arguments.folder, arguments.overwrite)


def _refuse_folder(output: Path, model: Path | None, overwrite: bool) -> None:
    if output.is_file():
        raise ValueError(f"{output}: is a file, not a folder")
    if model and output.is_dir() and output.samefile(model):
        raise ValueError(f"{output}: is the model itself")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output}: exists already and is not empty; --overwrite replaces the model in it")
    refuse_existing([output / "config.json"], [], overwrite=True)


def encode_dataset(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    locate(arguments.data, "--data")
    refuse_existing([Path(arguments.output) / "manifest.json"], [], overwrite=True)  # it may be continued


def set_scaling(arguments: argparse.Namespace) -> None:
    source = model_path(arguments.model)
    if not Path(arguments.model).is_dir():
        check_model(arguments.model)
        raise ValueError(
            f"{arguments.model}: not a model folder of yours, whose config could be changed; "
            f"kl-autoencoder export {arguments.model} -o FOLDER makes one"
        )
    if arguments.per_channel and arguments.pipeline not in (None, "sdxl"):
        raise ValueError(
            f"--per-channel: {arguments.pipeline} pipelines read no means of channels; allowed: --for sdxl"
        )
    model_folder(source)
    if not Path(arguments.latents).is_dir():
        raise FileNotFoundError(
            f"{arguments.latents}: no such folder; --from takes what encode-dataset wrote"
        )


def interpolate(arguments: argparse.Namespace) -> None:
    _one_picture(arguments, [arguments.a, arguments.b])
    if arguments.steps < 2:
        raise ValueError(f"--steps: {arguments.steps}; allowed: at least 2")
    check_model(arguments.model)


def sample(arguments: argparse.Namespace) -> None:
    _one_picture(arguments, [])
    if bool(arguments.fit) != bool(arguments.data):
        raise ValueError("--fit and --data SOURCE belong together")
    if arguments.data:
        locate(arguments.data, "--data")
    check_model(arguments.model)


def attribute(arguments: argparse.Namespace) -> None:
    _one_picture(arguments, [arguments.photograph])
    locate(arguments.plus, "--plus")
    locate(arguments.minus, "--minus")
    check_model(arguments.model)


def _one_picture(arguments: argparse.Namespace, inputs: Sequence[str]) -> None:
    """`output` becomes a Path."""
    arguments.output = Path(arguments.output)
    find_photographs(inputs)
    for path in inputs:
        if os.path.isdir(path):
            raise ValueError(f"{path}: is a folder; give one photograph")
    refuse_existing([arguments.output], inputs, arguments.overwrite)
    check_writable(arguments.output)


def anomaly(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path, `labels` a dict of name: label; adds `curves`, where theirs go."""
    arguments.output = Path(arguments.output)
    arguments.curves = arguments.output.with_suffix(".roc.csv")
    if arguments.output.suffix != ".csv":
        raise ValueError(f"{arguments.output}: scores are written to a .csv file")
    refuse_existing([arguments.output, arguments.curves], [arguments.labels or ""], arguments.overwrite)
    arguments.labels_file, arguments.labels = arguments.labels, _labels(arguments.labels)
    locate(arguments.reference, "--reference")
    locate(arguments.data, "--data")
    check_model(arguments.model)


def _labels(path: str | None) -> dict[str, int] | None:
    """Lines of name,label with label 0 (ordinary) or 1 (strange)."""
    if path is None:
        return None
    labels = {}
    with open(path, newline="") as file:
        for row in csv.reader(file):
            if len(row) != 2 or row[1].strip() not in ("0", "1"):
                raise ValueError(f"{path}: {','.join(row)!r}; allowed: lines of name,0 or name,1")
            labels[row[0]] = int(row[1])
    return labels
