"""attribute: strengthen or weaken in a photograph the attribute by which two sets of photographs differ."""

import argparse
from typing import TYPE_CHECKING

from ...data.locating import locate
from ..parser import IMAGES, Command, Parser, add_device, add_model, add_output, positive
from ..paths import check_model
from .latent_space import (
    add_size,
    all_rows,
    check_picture,
    decoded,
    posterior_of,
    posteriors_of,
    save_strip,
    size_of_squares,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.autoencoder_kl import KLAutoencoder

WAYS = "--plus with --minus, or --data with --column"


def attribute_arguments(parser: Parser) -> None:
    parser.add_argument("photograph", metavar="PHOTO", help="the photograph to change")
    parser.add_argument("--plus", metavar="SOURCE", help="photographs with the attribute")
    parser.add_argument("--minus", metavar="SOURCE", help="photographs without it")
    parser.add_argument("--data", metavar="SOURCE", help="or a table of both: parquet, a hub id")
    parser.add_argument(
        "--column",
        metavar="COLUMN",
        help="of --data, with the attribute: true or false, 1 or 0, 1 or -1; of other numbers the upper half",
    )
    parser.add_argument("--image-column", default="image", metavar="COLUMN", help="with the images (image)")
    parser.add_argument("--split", default="train", help="of --data (train)")
    parser.add_argument(
        "--limit", type=positive, default=1000, metavar="N", help="as many images of each kind (1000)"
    )
    parser.add_argument(
        "--strength", type=float, nargs="+", default=[0.0, 1.0], help="how often to add it (0 1)"
    )
    add_model(parser)
    add_size(parser, "crop all to squares of N x N (what the model is made for)")
    add_device(parser)
    add_output(parser, "STRIP.png", "a picture")


def check_attribute(arguments: argparse.Namespace) -> None:
    check_picture(arguments, [arguments.photograph])
    given = [name for name in ("plus", "minus", "data", "column") if getattr(arguments, name) is not None]
    if given not in (["plus", "minus"], ["data", "column"]):
        names = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{names or 'neither --plus nor --data'}; allowed: {WAYS}")
    for name in given:
        if name != "column":
            locate(getattr(arguments, name), f"--{name}")
    check_model(arguments.model)


def attribute(arguments: argparse.Namespace) -> None:
    """Decode a photograph's latents plus the attribute's direction at each strength, as a strip of pictures."""
    import torch

    from ...data.image_io import load_image
    from ..loading import load_model

    vae = load_model(arguments.model, arguments.device, "float32")
    size = size_of_squares(arguments.size, vae)
    direction = _of_column(vae, size, arguments) if arguments.data else _of_sources(vae, size, arguments)
    image = load_image(arguments.photograph, size, multiple_of=1, channels=vae.config.in_channels)
    latent = posterior_of(vae, image).mode()
    latents = torch.cat([latent + strength * direction.to(latent) for strength in arguments.strength])
    labels = [f"{strength:+g}" for strength in arguments.strength]
    save_strip(decoded(vae, latents, (size, size)), labels, arguments.output)


def _of_sources(vae: "KLAutoencoder", size: int, arguments: argparse.Namespace) -> "Tensor":
    """The direction (1, C, h, w) by --plus and --minus."""
    from ...latents.interpolation import mean_latent

    plus, minus = (
        mean_latent(posteriors_of(vae, *all_rows(source, f"--{name}"), size, f"encoding {name}"))
        for name, source in (("plus", arguments.plus), ("minus", arguments.minus))
    )
    return plus - minus


def _of_column(vae: "KLAutoencoder", size: int, arguments: argparse.Namespace) -> "Tensor":
    """The direction (1, C, h, w) by --column of --data."""
    from ...data.sources import Keys, column_values, open_source
    from ...latents.attributes import rows_of_kinds
    from ...latents.interpolation import mean_latent

    source, column, image_column = arguments.data, arguments.column, arguments.image_column
    keys = Keys("--data", "--image-column", "--column")
    rows = open_source(source, keys, image_column, arguments.split, keep=(column,), in_order=True)
    try:
        kinds = rows_of_kinds(column_values(rows, column), arguments.limit)
    except ValueError as error:
        raise ValueError(f"--column: {column!r} of {source}: {error}") from None
    plus, minus = (
        mean_latent(posteriors_of(vae, rows, numbers, size, f"encoding {what}", image_column))
        for what, numbers in zip(("with", "without"), kinds, strict=True)
    )
    return plus - minus


COMMANDS = {
    "attribute": Command(
        "add to a photograph what two kinds of photographs differ by",
        attribute_arguments,
        check_attribute,
        attribute,
        epilog=IMAGES,
    ),
}
