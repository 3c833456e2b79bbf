"""push: a model with its card and pictures to the hub, or to a folder that could be pushed."""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.folder import HUB_ID
from ..progress import Progress
from .models import check_model_output, write_model_folder
from .parser import MODEL, Command, Parser, add_dtype
from .paths import check_model, model_path, readable_folder

if TYPE_CHECKING:
    from ..models.autoencoder_kl import ExactAutoencoder

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")


def push_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL)
    parser.add_argument(
        "--to", required=True, metavar="OWNER/NAME", help="the repository, made if it is not there"
    )
    parser.add_argument("--license", metavar="ID", help="in the hub's words: mit, apache-2.0, openrail ...")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--dry-run", action="store_true", help="write what would be pushed to -o")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="with --dry-run: the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    add_dtype(parser, None, "store in this type (default: as it is)")


def check_push(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path or None; adds `run`, the folder of a training run, or None."""
    if not HUB_ID.fullmatch(arguments.to):
        raise ValueError(f"--to: {arguments.to!r}; allowed: owner/name")
    if arguments.license is not None and not LICENSE.fullmatch(arguments.license):
        raise ValueError(f"--license: {arguments.license!r}; allowed: an identifier, such as apache-2.0")
    if arguments.dry_run != bool(arguments.output):
        raise ValueError("--dry-run and -o FOLDER belong together")
    check_model(arguments.model)
    source = model_path(arguments.model)
    folder = readable_folder(source) if source.is_dir() else None
    arguments.run = source if (source / "config.yaml").is_file() else None
    if arguments.dry_run:
        arguments.output = Path(arguments.output)
        check_model_output(arguments.output, folder, arguments.overwrite)


def push(arguments: argparse.Namespace) -> None:
    """Write weights, config, card and picture to a folder, and commit it to the hub unless it is a dry run."""
    from ..models.hub import publish
    from .loading import load_model

    vae = load_model(arguments.model, "cpu", arguments.dtype)
    if arguments.dry_run:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_repository(vae, arguments.output, arguments.to, arguments.license, arguments.run)
        print(arguments.output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(vae, folder, arguments.to, arguments.license, arguments.run)
        with Progress(f"pushing to {arguments.to}"):
            print(publish(folder, arguments.to, arguments.private))


def write_repository(
    vae: "ExactAutoencoder", output: Path, repo: str, license: str | None, run: Path | None
) -> None:
    """What the repository is to hold: config, .safetensors files, README.md and, of a run, its last picture."""
    from ..models.hub_card import PICTURE, model_card, newest_picture

    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / "README.md"
        card.write_text(model_card(vae, repo, license, run), encoding="utf-8")
        others = {"README.md": card}
        if picture := run and newest_picture(run):
            others[PICTURE] = picture
        write_model_folder(vae, output, others)


COMMANDS = {
    "push": Command(
        "publish a model on the hub, with its card",
        push_arguments,
        check_push,
        push,
        description="Writes config.json, .safetensors files, a model card with the hub's metadata and, of a "
        "training run, its last figures and picture; no path of this machine is in it. Needs a token "
        "(`hf auth login`).",
    ),
}
