"""fp16-check: measure whether a model overflows in float16, and rescale it so that it does not."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...extras import require
from ...progress import tracked
from ..parser import IMAGES, MODEL, Command, Parser, add_device, add_json, add_output, positive
from ..paths import check_model, find_photographs, model_path, readable_folder
from .export import check_model_output, companions_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.autoencoder_kl import KLAutoencoder
    from ...models.half_precision.float16 import Activations

SAME_FUNCTION = 1e-4  # largest difference, as a share of the output's range, of models that count as the same


def fp16_check_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--images", metavar="FOLDER", help="measure on these photographs (default: a few of scikit-image)"
    )
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="of the images, N x N (256)")
    parser.add_argument("--fix", action="store_true", help="write the same model, rescaled to be safe, to -o")
    add_device(parser)
    add_output(parser, "FOLDER", "with --fix: a folder for diffusers", required=False)
    add_json(parser)


def check_fp16_check(arguments: argparse.Namespace) -> None:
    """`images` become (path, name) pairs, empty for the built-in ones; adds `folder`, the model's, or None."""
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
        check_model_output(arguments.output, arguments.folder, arguments.overwrite)


def fp16_check(arguments: argparse.Namespace) -> int:
    """Measure each layer's largest value; with --fix write the rescaled model. Returns 1 for an unsafe model."""
    from ...models.half_precision import float16, float16_check
    from ...models.publishing.repository import write_model_folder
    from ..loading import load_model

    photographs, folder, output = arguments.images, arguments.folder, arguments.output
    vae = load_model(arguments.model, arguments.device, "float32")
    noise = float16_check.noise_latents(vae, arguments.size)
    before = float16.measure(vae, _test_images(photographs, arguments.size), [noise])
    if arguments.fix:
        fixed = _fix(vae, before, _test_images(photographs, arguments.size), noise)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_model_folder(fixed, output, companions_of(folder))
        print(output)
        return 0
    unsafe = before.unsafe()
    if arguments.json:
        found = {"safe": not unsafe, "limit": float16.LIMIT, "unsafe": unsafe}
        print(json.dumps({"model": arguments.model, **found, "largest": before.by_layer()}, indent=1))
        return int(bool(unsafe))
    print(float16_check.layers_table({"largest": before}))
    print(float16_check.verdict(before))
    if unsafe:
        print("--fix -o FOLDER writes the same model, rescaled to be safe")
    elif vae.config.get("force_upcast"):
        print("force_upcast in its config is not needed; --fix -o FOLDER writes it without")
    return int(bool(unsafe))


def _fix(
    vae: "KLAutoencoder", before: "Activations", images: Iterator["Tensor"], noise: "Tensor"
) -> "KLAutoencoder":
    """Rescale a model for float16 and print what changes; ValueError if it stays unsafe or its outputs change."""
    from ...models.half_precision import float16, float16_check

    fixed = float16.rescaled(vae, before)
    others = {
        "fixed": fixed,
        "before": float16_check.in_float16(vae),
        "after": float16_check.in_float16(fixed),
    }
    with float16.recording(fixed) as after:
        compared = float16_check.compare(vae, others, images, [noise])
    same = max(difference.relative for difference in compared["fixed"])
    eps = float16.norm_change(before, after)
    print(float16_check.layers_table({"before": before, "after": after}))
    print(f"before: {float16_check.verdict(before)}")
    print(f"after:  {float16_check.verdict(after)}")
    print(f"float32: before and after differ by {same:.2g} of the range at most, norms, by eps, by {eps:.2g}")
    for name in ("before", "after"):
        latents, decoded = compared[name]
        print(f"float16: {name} against float32: latents {latents}, images {decoded}")
    if after.unsafe():
        stuck = ", ".join(after.unsafe()[:4])
        raise ValueError(f"rescaling cannot bring into range: {stuck}; nothing is written")
    if same > SAME_FUNCTION or not all(math.isfinite(difference.largest) for difference in compared["after"]):
        raise ValueError("the rescaled model is not the same; nothing is written")
    return fixed


def _test_images(photographs: list[tuple[Path, str]], size: int) -> Iterator["Tensor"]:
    """Yield the images to measure on: difficult ones, then `photographs` or, if there are none, scikit-image's.

    Photographs that cannot be read are reported, skipped and removed from the list.
    """
    from ...models.half_precision import float16_check
    from ..loading import read_photographs

    built_in = [
        *float16_check.hard_images(size),
        *([] if photographs else float16_check.sample_photographs(size)),
    ]
    yield from tracked(built_in, "measuring hard images" if photographs else "measuring", "images")
    if not photographs:
        return
    unread = []
    yield from (images for _, images in read_photographs(photographs, size, unread, "measuring"))
    if len(unread) == len(photographs):
        raise ValueError("none of the photographs could be read")
    photographs[:] = [photograph for photograph in photographs if photograph[0] not in unread]


COMMANDS = {
    "fp16-check": Command(
        "whether a model overflows in float16, and the same model that does not",
        fp16_check_arguments,
        check_fp16_check,
        fp16_check,
        description="Measures the largest value in each layer, in float32, on photographs and on hard images. "
        "Exit status: 0 if the model, or what --fix wrote, is safe in float16; 1 if it is not; 2 after an error.",
        epilog=IMAGES,
    ),
}
