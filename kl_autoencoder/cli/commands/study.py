"""study: bounds of log p(x), information in latents, use of codes, and pictures of a model's latents."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...console import say
from ...data.locating import locate
from ...extras import require
from ...files import replacing
from ...models.run_folder import METRICS_FILE, read_metrics
from ...progress import Progress, tracked, write
from ..parser import IMAGES, MODEL, Command, Parser, add_device, add_json, add_output, positive
from ..paths import check_model, model_path, refuse_existing
from .latent_space import add_size, size_of_squares

if TYPE_CHECKING:
    from torch import Tensor

MEASURES = "measures.json"
LIKELIHOODS = ("gaussian", "laplace", "bernoulli")
TRAINED_AS = {"l1": "laplace", "l2": "gaussian"} | {kind: kind for kind in LIKELIHOODS}  # loss.reconstruction
IN_NATS = ("distortion", "rate", "elbo", "iwae_50", "mutual_information", "aggregate_kl")


def study_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images: a folder, parquet, a hub id")
    add_size(parser, "crop all to squares of N x N (what the model is made for)")
    parser.add_argument(
        "--limit", type=positive, default=1000, metavar="N", help="as many images, spread evenly (1000)"
    )
    parser.add_argument("--image-column", default="image", metavar="COLUMN", help="with the images (image)")
    parser.add_argument(
        "--label-column",
        metavar="COLUMN",
        help="with their classes (default: names of folders, if there are any)",
    )
    parser.add_argument("--split", default="train", help="the split of a data set on the hub (train)")
    parser.add_argument(
        "--likelihood", choices=LIKELIHOODS, help="p(x|z) of the bounds (that of the run, else gaussian)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    add_device(parser)
    add_output(parser, "FOLDER", f"for pictures and {MEASURES}")
    add_json(parser)


def check_study(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path."""
    require("eval", "matplotlib", "sklearn")
    arguments.output = Path(arguments.output)
    if arguments.output.is_file():
        raise ValueError(f"{arguments.output}: is a file; a folder is written")
    refuse_existing([arguments.output / MEASURES], [], arguments.overwrite)
    check_model(arguments.model)
    locate(arguments.data, "--data")


def study(arguments: argparse.Namespace) -> None:
    """Measure a model, draw its pictures, and write the measures last."""
    from ...evaluation.variational import measures
    from ..loading import load_model

    model = load_model(arguments.model, arguments.device, "float32")
    labelled = _read(arguments, model)
    given = labelled.classes if model.config.get("classes") else None
    data = measures.Images(labelled.images, _as_tensor(given))
    with Progress("encoding", len(data.images), "images") as progress:
        encoded = measures.encode(model, data, progress.update)
    likelihood = arguments.likelihood or _likelihood_of_run(model_path(arguments.model))
    with Progress("measuring", len(data.images), "images") as progress:
        found = measures.measure(model, data, encoded, likelihood, arguments.seed, progress.update)
    arguments.output.mkdir(parents=True, exist_ok=True)
    _draw(arguments, model, data, encoded, labelled)
    with replacing(arguments.output / MEASURES) as path:
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _tell(found, arguments.json)


class Labelled(NamedTuple):
    """images: (N, C, H, W). classes: (N,), numbers, or None without labels. names: of the classes, by number."""

    images: "Tensor"
    classes: list[int] | None
    names: list[str]


def _read(arguments: argparse.Namespace, model: Any) -> Labelled:
    """The images of --data, in the model's size and channels, with their classes."""
    import numpy as np
    import torch

    from ...data.image_io import load_image, open_image
    from ...data.sources import Keys, encoded_file, open_source, record_name

    column, label_column = arguments.image_column, arguments.label_column
    keep = (label_column,) if label_column else ()
    rows = open_source(
        arguments.data, Keys("--data", "--image-column"), column, arguments.split, keep=keep, in_order=True
    )
    size, channels = size_of_squares(arguments.size, model), model.config.in_channels
    if label_column and len(rows) and label_column not in rows[0]:
        raise ValueError(f"--label-column: {arguments.data} has files alone; allowed: a folder a class")
    images, labels = [], []
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), arguments.limit)).round().astype(int))
    for number in tracked(chosen.tolist(), "reading", "images"):
        row = rows[number]
        name = record_name(row[column], f"row {number}")
        try:
            opened = open_image(encoded_file(row[column], name), channels)
            images.append(load_image(opened, size, multiple_of=1, channels=channels))
        except (ValueError, OSError) as error:
            say("skipped", error)
            continue
        labels.append(row[label_column] if label_column else _folder(row[column], arguments.data))
    if len(images) < 2:
        raise ValueError(
            f"--data: {len(images)} images of {arguments.data} could be read; allowed: at least 2"
        )
    return Labelled(torch.cat(images), *_numbered(labels))


def _folder(record: dict, source: str) -> str | None:
    """The folder of an image within the source, which names its class; None for one that lies in no folder."""
    path = Path((record or {}).get("path") or "")
    folder = Path(source).expanduser()
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return parts[0] if len(parts) > 1 else None


def _numbered(labels: Sequence[Any]) -> tuple[list[int] | None, list[str]]:
    """Labels -> the number of each among the sorted ones, and their names; None if all are one or one missing."""
    found = set(labels)
    if None in found or len(found) < 2:
        return None, []
    order = {label: number for number, label in enumerate(sorted(found))}
    return [order[label] for label in labels], [str(label) for label in order]


def _as_tensor(classes: list[int] | None) -> "Tensor | None":
    import torch

    return None if classes is None else torch.tensor(classes)


def _run_of(path: Path) -> Path:
    """The folder of the run that a model is of, if it is of one: itself, or the one around its export."""
    return path if (path / "config.yaml").is_file() else path.parent


def _likelihood_of_run(path: Path) -> str:
    """That which the run was trained with, in its config.yaml; Gaussian where there is none."""
    import yaml

    config = _run_of(path) / "config.yaml"
    loss = (
        (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("loss") if config.is_file() else None
    )
    return TRAINED_AS.get((loss or {}).get("reconstruction"), "gaussian")


def _draw(arguments: argparse.Namespace, model: Any, data: Any, encoded: Any, labelled: Labelled) -> None:
    from ...evaluation.pictures.album import pictures
    from ...evaluation.pictures.style import save

    records = read_metrics(_run_of(model_path(arguments.model)) / METRICS_FILE)
    for name, draw in pictures(model, data, encoded, labelled.classes, labelled.names, records):
        path = arguments.output / name
        with Progress(f"drawing {name}"):
            save(draw(), path)
        if not arguments.json:
            write(str(path))


def _tell(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    for name, value in found.items():
        shown = f"{value:.5g}" if isinstance(value, float) else value
        print(f"{name:20}{shown}{' nats' if name in IN_NATS else ''}")


COMMANDS = {
    "study": Command(
        "measures and pictures of a model's latents, of any size and number of channels",
        study_arguments,
        check_study,
        study,
        description="Of a Gaussian posterior: rate, distortion, ELBO, the bound of 50 importance samples, active "
        "units, mutual information. Of a code book: perplexity and usage. Of other latents: MMD from the prior. "
        "And pictures: the manifold of two latents, traversals, latents by class, codes, the ELBO over training.",
        epilog=IMAGES,
    ),
}
