"""interpolate, sample: decode latents between those of two photographs, or drawn from a distribution."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...console import say
from ...data.formats import check_writable
from ...data.locating import locate
from ...progress import tracked
from ..parser import IMAGES, MODEL, Command, Parser, add_device, add_model, add_output, positive
from ..paths import check_model, find_photographs, model_folder, refuse_existing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ...data.sources import Rows
    from ...models.autoencoder_kl import KLAutoencoder
    from ...networks.distributions import DiagonalGaussian


def interpolate_arguments(parser: Parser) -> None:
    parser.add_argument("a", metavar="A", help="a photograph")
    parser.add_argument("b", metavar="B", help="another, which is cropped to the size of A")
    add_model(parser)
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="pictures, A and B included (8)")
    parser.add_argument(
        "--spherical", action="store_true", help="along an arc, which keeps the latents' norm"
    )
    add_size(parser, "crop both to squares of N x N")
    add_device(parser)
    add_output(parser, "STRIP.png", "a picture")


def check_interpolate(arguments: argparse.Namespace) -> None:
    check_picture(arguments, [arguments.a, arguments.b])
    if arguments.steps < 2:
        raise ValueError(f"--steps: {arguments.steps}; allowed: at least 2")
    check_model(arguments.model)


def interpolate(arguments: argparse.Namespace) -> None:
    """Decode latents between those of two photographs, as a strip of pictures."""
    from ...data.image_io import image_size, load_image
    from ...latents import interpolation
    from ..loading import load_model

    a, b = arguments.a, arguments.b
    vae = load_model(arguments.model, arguments.device, "float32")
    side = arguments.size or (vae.config.sample_size if getattr(vae, "is_mlp", False) else None)
    size = (side, side) if side else image_size(a)
    channels = vae.config.in_channels
    images = [load_image(path, size, multiple_of=1, channels=channels) for path in (a, b)]
    ends = [posterior_of(vae, image).mode()[0] for image in images]
    latents = interpolation.interpolate(*ends, arguments.steps, arguments.spherical)
    labels = [f"{i / (len(latents) - 1):.2f}" for i in range(len(latents))]
    save_strip(decoded(vae, latents, size), labels, arguments.output)


def sample_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--data", metavar="SOURCE", help="photographs for --fit: a folder, parquet, a hub id")
    parser.add_argument(
        "--fit", choices=["channel", "position"], help="a mean and variance for each channel or value"
    )
    parser.add_argument(
        "--prior",
        metavar="FOLDER",
        help="of a MODEL with codes: draw them from this prior, of task: code_prior",
    )
    parser.add_argument(
        "--label",
        type=int,
        metavar="N",
        help="draw this class, of a conditional model or prior (all in turn)",
    )
    add_size(parser, "of the pictures (what the model is made for)")
    parser.add_argument("--grid", type=positive, default=4, metavar="N", help="N x N draws (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    add_device(parser)
    add_output(parser, "GRID.png", "a picture")


def check_sample(arguments: argparse.Namespace) -> None:
    check_picture(arguments, [])
    if bool(arguments.fit) != bool(arguments.data):
        raise ValueError("--fit and --data SOURCE belong together")
    if arguments.data:
        locate(arguments.data, "--data")
    if arguments.prior is not None:
        if arguments.fit or arguments.size:
            raise ValueError("--prior: beside --fit or --size; allowed: alone, its codes are of one size")
        check_model(arguments.prior, ("CodePrior",))
    check_model(arguments.model)


def sample(arguments: argparse.Namespace) -> None:
    """Decode draws from the model's prior, from a trained prior, or from a Gaussian fitted to photographs."""
    from ...data.image_io import image_grid
    from ..loading import load_model

    vae = load_model(arguments.model, arguments.device, "float32")
    images = _draws_of_prior(vae, arguments) if arguments.prior else _draws_of_gaussian(vae, arguments)
    _save_picture(image_grid(images.chunk(arguments.grid)), arguments.output)


def _draws_of_gaussian(vae: "KLAutoencoder", arguments: argparse.Namespace) -> "Tensor":
    import torch

    from ...latents import interpolation

    size, count = size_of_squares(arguments.size, vae), arguments.grid**2
    side = size // vae.downsampling
    generator = torch.Generator().manual_seed(arguments.seed)
    labels = _labels(arguments, vae.config.get("classes") or None, arguments.model)
    if prior := _prior_of(vae):
        draws = prior.sample(count * side**2, vae.config.latent_channels, generator)
        latents = draws.view(count, side, side, -1).movedim(-1, 1)
    else:
        gaussian = interpolation.standard_normal(vae.config.latent_channels, side, side)
        if arguments.fit:
            gaussian = interpolation.fitted(
                posteriors_of(vae, *all_rows(arguments.data, "--data"), size, "encoding data"), arguments.fit
            )
        latents = torch.cat([gaussian.sample(generator) for _ in range(count)])
    return decoded(vae, latents, (size, size), labels)


def _prior_of(vae: Any) -> Any:
    """The prior of an adversarial autoencoder, None for the Gaussian one. ValueError for a discrete model."""
    bottleneck = vae.config.get("bottleneck") or {"kind": "kl"}
    if getattr(vae, "is_discrete", False):
        raise ValueError(
            "a model of codes draws nothing without a prior over them; allowed: with --prior FOLDER"
        )
    return vae.bottleneck_module.prior if bottleneck["kind"] == "adversarial" else None


def _labels(arguments: argparse.Namespace, classes: int | None, source: str) -> "Tensor | None":
    """A label for each picture: that of --label, else all labels in turn; None if `source` has no labels."""
    import torch

    one, count = arguments.label, arguments.grid**2
    if classes is None:
        if one is not None:
            raise ValueError(f"--label: {one}; allowed: none, {source} knows no labels")
        return None
    if one is not None and not 0 <= one < classes:
        raise ValueError(f"--label: {one}; allowed: whole numbers below {classes}")
    return torch.arange(count) % classes if one is None else torch.full((count,), one)


def _draws_of_prior(vae: Any, arguments: argparse.Namespace) -> "Tensor":
    """Decode codes drawn from the `CodePrior` of --prior, for --label or for all labels in turn."""
    import torch

    from ...models.priors import CodePrior

    prior = CodePrior.from_pretrained(model_folder(Path(arguments.prior), ("CodePrior",))).eval()
    codes = vae.codes if getattr(vae, "is_discrete", False) else None
    if codes != prior.config.codes:
        raise ValueError(
            f"--prior: {arguments.prior} is of {prior.config.codes} codes, {arguments.model} has "
            f"{codes or 'none'}; allowed: the prior of this model, {prior.config.autoencoder}'s"
        )
    labels = _labels(arguments, prior.config.classes, arguments.prior)
    generator = torch.Generator().manual_seed(arguments.seed)
    drawn = prior.sample(arguments.grid**2, labels, generator=generator)
    with torch.inference_mode():
        return torch.cat([vae.decode_indices(one.to(vae.device)).cpu() for one in drawn.split(1)])


def check_picture(arguments: argparse.Namespace, inputs: Sequence[str]) -> None:
    """Refuse inputs that are not one photograph each, and an output that is not a picture; it becomes a Path."""
    arguments.output = Path(arguments.output)
    find_photographs(inputs)
    for path in inputs:
        if os.path.isdir(path):
            raise ValueError(f"{path}: is a folder; give one photograph")
    refuse_existing([arguments.output], inputs, arguments.overwrite)
    check_writable(arguments.output)


def add_size(parser: Parser, help: str) -> None:
    parser.add_argument("--size", type=positive, metavar="N", help=help)


def size_of_squares(given: int | None, vae: "KLAutoencoder") -> int:
    """Pixels a side: --size, or the size that the model is made for. ValueError unless it is a multiple of f."""
    size = given or vae.config.sample_size
    if size % vae.downsampling:
        raise ValueError(f"--size: {size}; allowed: multiples of {vae.downsampling}")
    return size


def open_photographs(source: str, key: str) -> "Rows":
    from ...data.sources import Keys, open_source

    return open_source(source, Keys(key, key), in_order=True)


def all_rows(source: str, key: str) -> tuple["Rows", range]:
    photographs = open_photographs(source, key)
    return photographs, range(len(photographs))


def read_squares(
    photographs: "Rows", rows: Sequence[int], size: int, what: str, channels: int, column: str = "image"
) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name, images (1, channels, size, size) in [-1, 1]), centre squares; unreadable ones are reported."""
    from ...data.image_io import load_image, open_image
    from ...data.sources import encoded_file

    for row in tracked(rows, what, "images"):
        record = photographs[row][column]
        name = (record or {}).get("path") or f"row {row}"
        try:
            opened = open_image(encoded_file(record, name), channels)
            yield name, load_image(opened, size, multiple_of=1, channels=channels)
        except (ValueError, OSError) as error:
            say("skipped", error)


def posterior_of(vae: "KLAutoencoder", images: "Tensor") -> "DiagonalGaussian":
    import torch

    from ...data.image_io import pad_to_multiple

    with torch.inference_mode():
        return vae.encode(pad_to_multiple(images, vae.downsampling).to(vae.device)).latent_dist


def posteriors_of(
    vae: "KLAutoencoder",
    photographs: "Rows",
    rows: Sequence[int],
    size: int,
    what: str,
    column: str = "image",
) -> Iterator["DiagonalGaussian"]:
    """Yield the posterior of each readable image of `rows`; `what` is the heading of the progress bar."""
    squares = read_squares(photographs, rows, size, what, vae.config.in_channels, column)
    return (posterior_of(vae, images) for _, images in squares)


def decoded(
    vae: "KLAutoencoder", latents: "Tensor", size: tuple[int, int], labels: "Tensor | None" = None
) -> "Tensor":
    """Decode latents one at a time, so that an image does not depend on the others, and crop to `size` (H, W)."""
    import torch

    with torch.inference_mode():
        conditions = (
            [{}] * len(latents) if labels is None else [{"labels": label} for label in labels.split(1)]
        )
        singly = tracked(list(zip(latents.split(1), conditions, strict=True)), "decoding", "images")
        images = [vae.decode(z.to(vae.device), **given).sample.cpu() for z, given in singly]
    return torch.cat(images)[:, :, : size[0], : size[1]]


def save_strip(images: "Tensor", labels: Sequence[str], output: Path) -> None:
    from ...data.image_io import image_grid

    _save_picture(image_grid(images.split(1), labels), output)


def _save_picture(picture: "Image.Image", output: Path) -> None:
    from ...data.image_io import save_image

    output.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, output)
    print(output)


COMMANDS = {
    "interpolate": Command(
        "a strip of pictures between two photographs",
        interpolate_arguments,
        check_interpolate,
        interpolate,
        epilog=IMAGES,
    ),
    "sample": Command(
        "decoded draws from the prior, or from a Gaussian fitted to data",
        sample_arguments,
        check_sample,
        sample,
        epilog=IMAGES,
    ),
}
