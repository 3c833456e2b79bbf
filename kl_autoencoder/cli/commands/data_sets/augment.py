"""augment: make variants of the images in a folder, by class, to train a classifier on."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ....progress import tracked
from ...parser import IMAGES, Command, Parser, add_device, add_model, add_output, positive
from ...paths import check_model, find_photographs, names_in_folder, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("noise", "between", "drawn")


def augment_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="images, in a folder a class or all in this one")
    add_model(parser)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["noise", "between"],
        help="noise: draws from an image's posterior; between: from an image up to half of the way to another of "
        "its class; drawn: from the prior, by class, of a model with classes (noise between)",
    )
    parser.add_argument(
        "--each", type=positive, default=1, metavar="N", help="variants of each kind an image (1)"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="multiplies the posterior's noise (1)")
    parser.add_argument("--size", type=positive, metavar="N", help="crop all to squares of N x N")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    add_device(parser)
    add_output(parser, "OUT", "a folder, in which the classes are folders again")


def check_augment(arguments: argparse.Namespace) -> None:
    """Adds `names`, of the images, and `targets`, (kind, name, number) of each variant -> its path."""
    folder, output = Path(arguments.folder), Path(arguments.output)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; allowed: a folder of images")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output}: is inside {folder}, whose images it would be among; allowed: elsewhere")
    if not arguments.strength >= 0:
        raise ValueError(f"--strength: {arguments.strength}; allowed: from 0 on")
    photographs = find_photographs([arguments.folder])
    arguments.names = [name for _, name in photographs]
    plan = [
        (kind, name, number)
        for name in arguments.names
        for kind in dict.fromkeys(arguments.kinds)
        for number in range(arguments.each)
    ]
    files = [str(Path(name).with_name(f"{Path(name).stem}-{kind}-{n}.png")) for kind, name, n in plan]
    arguments.targets = dict(zip(plan, names_in_folder(output, files, ".png"), strict=True))
    refuse_existing(list(arguments.targets.values()), [], arguments.overwrite)
    check_model(arguments.model)


def augment(arguments: argparse.Namespace) -> None:
    """Write the variants of each image of a folder, and print how many there are of each kind."""
    from ....data.image_io import save_image
    from ....latents.augmentation import Augmenter
    from ...loading import load_model

    vae = load_model(arguments.model, arguments.device, "float32")
    read = partial(_read, Path(arguments.folder), arguments.size, vae.config.in_channels)
    try:
        augmenter = Augmenter(vae, read, arguments.names, arguments.seed, arguments.strength)
        variants = augmenter.plan(list(dict.fromkeys(arguments.kinds)), arguments.each)
        for variant in tracked(variants, "augmenting", "images"):
            target = arguments.targets[variant.kind, variant.name, variant.number]
            target.parent.mkdir(parents=True, exist_ok=True)
            save_image(augmenter.make(variant), target)
    except ValueError as error:
        raise ValueError(f"{arguments.folder}: {error}") from error
    made = [variant.kind for variant in variants]
    counts = ", ".join(f"{made.count(kind)} {kind}" for kind in dict.fromkeys(arguments.kinds))
    print(f"{arguments.output}: {counts}, of {len(arguments.names)} images")


def _read(folder: Path, side: int | None, channels: int, name: str, size: tuple[int, int] | None) -> "Tensor":
    """Read an image of the folder: at `size` (H, W) if given, else as a square of `side`, else with every pixel."""
    from ....data.image_io import load_image

    return load_image(folder / name, size or side, multiple_of=1, channels=channels)


COMMANDS = {
    "augment": Command(
        "more images like those of a folder, by class",
        augment_arguments,
        check_augment,
        augment,
        epilog=IMAGES,
    )
}
