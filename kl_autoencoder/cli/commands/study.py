"""study: measure bounds of log p(x), information in latents and use of codes, and draw a model's latents."""

import argparse
import json
from pathlib import Path
from typing import Any

from ...data.locating import locate
from ...extras import require
from ...files import replacing
from ...models.run_folder import METRICS_FILE, read_metrics
from ...progress import Progress, write
from ..parser import IMAGES, MODEL, Command, Parser, add_device, add_json, add_output, positive
from ..paths import check_model, model_path, refuse_existing
from .latent_space import add_size, size_of_squares

MEASURES = "measures.json"
LIKELIHOODS = ("gaussian", "laplace", "bernoulli")
# loss.reconstruction of a run -> likelihood
TRAINED_AS = {"l1": "laplace", "l2": "gaussian"} | {kind: kind for kind in LIKELIHOODS}
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
    parser.add_argument("--split", default="validation", help="the split of a data set (validation)")
    parser.add_argument(
        "--likelihood", choices=LIKELIHOODS, help="p(x|z) of the bounds (that of the run, else gaussian)"
    )
    parser.add_argument(
        "--binarize",
        choices=["fixed", "dynamic"],
        help="make images black and white (as the run did, if any)",
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
    locate(arguments.data, "--data", "validation")


def study(arguments: argparse.Namespace) -> None:
    """Measure a model, draw its pictures, and write the measures last."""
    from ...evaluation.pictures.album import pictures
    from ...evaluation.pictures.style import save
    from ...evaluation.variational import measures
    from ..labelled_images import binarised, read_labelled
    from ..loading import load_model

    model = load_model(arguments.model, arguments.device, "float32")
    likelihood, binarize = _of_run(model_path(arguments.model))
    labelled = read_labelled(
        arguments.data, size_of_squares(arguments.size, model), model.config.in_channels, arguments.limit,
        arguments.image_column, arguments.label_column, arguments.split,
    )  # fmt: skip
    images = labelled.images
    if binarize := arguments.binarize or binarize:
        images = binarised(images, binarize, arguments.seed)
    data = measures.Images(images, labelled.classes if model.config.get("classes") else None)
    with Progress("encoding", len(data.images), "images") as progress:
        encoded = measures.encode(model, data, progress.update)
    with Progress("measuring", len(data.images), "images") as progress:
        found = measures.measure(
            model, data, encoded, arguments.likelihood or likelihood, arguments.seed, progress.update
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = read_metrics(_run_of(model_path(arguments.model)) / METRICS_FILE)
    for name, draw in pictures(model, data, encoded, labelled.classes, labelled.names, records):
        with Progress(f"drawing {name}"):
            save(draw(), arguments.output / name)
        if not arguments.json:
            write(str(arguments.output / name))
    with replacing(arguments.output / MEASURES) as path:
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _tell(found, arguments.json)


def _run_of(path: Path) -> Path:
    """The folder of the run of a model: `path` itself, or its parent if `path` is the run's export."""
    return path if (path / "config.yaml").is_file() else path.parent


def _of_run(path: Path) -> tuple[str, str | None]:
    """The likelihood and the binarisation that a model was trained with; gaussian and None without a run."""
    import yaml

    file = _run_of(path) / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    loss, data = (config.get(key) or {} for key in ("loss", "data"))
    return TRAINED_AS.get(loss.get("reconstruction"), "gaussian"), data.get("binarize")


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
