"""compress, decompress: photographs to files of a few kilobytes and back; `info` for such a file."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...codec import container
from ...codec.steps import DEFAULT_QUALITY, HIGHEST, LOWEST, step_of
from ...console import say
from ...extras import require
from ...files import replacing
from ...models.folder import ENTROPY_MODEL
from ...models.packaged import COMPACT_CODEC
from ...progress import tracked, write
from ..parser import IMAGES, Command, Parser, add_computation, add_model, add_output, positive
from ..paths import (
    check_model,
    find_photographs,
    model_path,
    names_in_folder,
    plan_targets,
    readable_folder,
    refuse_existing,
)

if TYPE_CHECKING:
    from PIL import Image

    from ...codec.codec import Codec

KEPT = f"Any size. Alpha, colour profile and EXIF are not kept. {IMAGES}"


def compress_arguments(parser: Parser) -> None:
    parser.add_argument("photographs", nargs="+", metavar="IMAGE", help="images and folders of them")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--quality",
        type=quality,
        metavar="N",
        help=f"{LOWEST} to {HIGHEST} ({DEFAULT_QUALITY}); 16 more halve the step of the latents",
    )
    rate.add_argument(
        "--bytes", type=positive, metavar="N", help="the best quality of at most N bytes an image"
    )
    rate.add_argument("--bpp", type=bits, metavar="X", help="the best quality of at most X bits a pixel")
    add_model(parser, COMPACT_CODEC.name)
    add_computation(parser)
    add_output(parser, f"OUT{container.SUFFIX}", "a file, or a folder for several images")


def quality(text: str) -> int:
    """Type of an option: a quality."""
    if not LOWEST <= int(text) <= HIGHEST:
        raise argparse.ArgumentTypeError(f"must be from {LOWEST} to {HIGHEST}, not {text}")
    return int(text)


def bits(text: str) -> float:
    """Type of an option: bits per pixel, above 0 and at most 24."""
    if not 0 < float(text) <= 24:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 24, not {text}")
    return float(text)


def check_compress(arguments: argparse.Namespace) -> None:
    """`photographs` become (path, name) pairs; adds `targets`, a path for each."""
    require("codec")
    single = len(arguments.photographs) == 1 and not Path(arguments.photographs[0]).is_dir()
    photographs, output = find_photographs(arguments.photographs), Path(arguments.output)
    if output.suffix == container.SUFFIX and not output.is_dir():
        if not single:
            raise ValueError(f"{output}: is one file; give a folder for several images")
        arguments.targets = [output]
    elif single and output.suffix and not output.is_dir():
        raise ValueError(f"{output}: compressed images are written to {container.SUFFIX} files")
    else:
        arguments.targets = names_in_folder(output, [name for _, name in photographs], container.SUFFIX)
    refuse_existing(arguments.targets, [path for path, _ in photographs], arguments.overwrite)
    check_model(arguments.model)
    arguments.photographs = photographs


def compress(arguments: argparse.Namespace) -> None:
    """Write each image as a file that the same model decompresses."""
    from ...codec.codec import bytes_of
    from ..loading import read_photographs, refuse_unread

    photographs, targets, unread = arguments.photographs, arguments.targets, []
    codec = load_codec(arguments, arguments.model)
    if not codec.learned:
        say(
            "warning",
            f"{arguments.model} has no {ENTROPY_MODEL}: tables fitted to each image take more bytes",
        )
    for i, images in read_photographs(photographs, None, unread, "compressing", codec.vae):
        height, width = images.shape[2:]
        most = bytes_of(arguments.bpp, (height, width)) if arguments.bpp else arguments.bytes
        try:
            if most is not None:
                data = codec.compress_to(images, most)
            else:
                data = codec.compress(images, arguments.quality or DEFAULT_QUALITY)
        except ValueError as error:
            raise ValueError(f"{photographs[i][0]}: {error}") from error
        targets[i].parent.mkdir(parents=True, exist_ok=True)
        with replacing(targets[i]) as temporary:
            temporary.write_bytes(data)
        rate = f"{len(data):,} bytes, {8 * len(data) / (height * width):.3f} bits a pixel"
        write(f"{photographs[i][1]} -> {targets[i]}: {rate}")
    refuse_unread(unread, photographs)


def decompress_arguments(parser: Parser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="files that compress wrote, and folders of them"
    )
    add_model(
        parser, None, "compact-codec or compact, as a file says; it must be the one that compressed them"
    )
    add_computation(parser)
    add_output(parser, "IMAGE.png", "a picture, or a folder for several")


def check_decompress(arguments: argparse.Namespace) -> None:
    """`files` become paths; adds `targets`, a path for each. The bytes of a single file are checked."""
    require("codec")
    files = find_compressed(arguments.files)
    single = len(files) == 1 and not Path(arguments.files[0]).is_dir()
    arguments.targets = plan_targets(arguments.output, [name for _, name in files], single)
    arguments.files = [path for path, _ in files]
    refuse_existing(arguments.targets, arguments.files, arguments.overwrite)
    if arguments.model is not None:
        check_model(arguments.model)
    if single:
        read_header(arguments.files[0])


def find_compressed(inputs: Sequence[str]) -> list[tuple[Path, str]]:
    """List compressed files in files and folders as (path, name).

    The name is the path relative to the given folder, or the file name of a file given itself. Raises ValueError
    for a folder without such files.
    """
    found = []
    for given in map(Path, inputs):
        if not given.is_dir():
            found.append((given, given.name))
            continue
        inside = sorted(path for path in given.rglob(f"*{container.SUFFIX}") if path.is_file())
        if not inside:
            raise ValueError(f"{given}: no {container.SUFFIX} files in it")
        found += [(path, path.relative_to(given).as_posix()) for path in inside]
    return found


def decompress(arguments: argparse.Namespace) -> None:
    """Write the image of each file. Of several files, damaged ones are reported and skipped."""
    from ..loading import write_picture

    codec_by_name, damaged = lru_cache(partial(load_codec, arguments)), 0
    if arguments.model is not None:
        codec_by_name(arguments.model)  # an error here is not one of a file

    def codec_for(header: container.Header) -> "Codec":
        return codec_by_name(arguments.model or container.model_for(header))

    for path, target in zip(
        tracked(arguments.files, "decompressing", "images"), arguments.targets, strict=True
    ):
        try:
            image = decompress_file(codec_for, path)
        except (ValueError, OSError) as error:
            if len(arguments.files) == 1:
                raise
            say("skipped", error)
            damaged += 1
        else:
            write_picture(image, target, path.name)
    if damaged:
        raise ValueError(f"{damaged} of {len(arguments.files)} files could not be decompressed")


def load_codec(arguments: argparse.Namespace, model: str) -> "Codec":
    """Load the codec of a model, with the entropy model in its folder if there is one."""
    from ...codec.codec import Codec
    from ...codec.context_model import ContextModel
    from ..loading import load_model

    vae = load_model(model, arguments.device, arguments.dtype)
    path = model_path(model)
    learned = ContextModel.beside(readable_folder(path)) if path.is_dir() else None
    return Codec(vae, Path(model).name, learned)


def decompress_file(codec_for: "Callable[[container.Header], Codec]", path: Path) -> "Image.Image":
    """Decompress a file with the codec for its header. Raises ValueError, which names the file."""
    data = container.read(path)
    try:
        header, _ = container.unpack(data)
        return codec_for(header).decompress(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------- info


def is_compressed(name: str) -> bool:
    """Whether `info` is asked about a compressed file, by its suffix."""
    return Path(name).suffix == container.SUFFIX and not Path(name).is_dir()


def print_header(name: str, as_json: bool) -> None:
    """Print the header of a compressed file."""
    header, sizes = read_header(Path(name))
    total = Path(name).stat().st_size
    facts = {
        "file": name,
        "version": container.VERSION,
        "width": header.width,
        "height": header.height,
        "bytes": total,
        "bits_a_pixel": round(8 * total / (header.width * header.height), 5),
        "quality": header.quality,
        "step": step_of(header.quality),
        "model": header.model_name,
        "model_hash": header.model_hash.hex(),
        "entropy_model": header.entropy_hash.hex() or "static tables",
        "chunks": sizes,
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if key == "chunks" else value
        print(f"{key.replace('_', ' '):14}{shown}")


def read_header(path: Path) -> tuple[container.Header, list[int]]:
    """Read and check a whole file: its header and the bytes of each chunk. Raises ValueError, which names it."""
    data = container.read(path)
    try:
        header, chunks = container.unpack(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return header, [len(chunk) for chunk in chunks]


COMMANDS = {
    "compress": Command(
        "images to files of a few kilobytes", compress_arguments, check_compress, compress, epilog=KEPT
    ),
    "decompress": Command("such files back to images", decompress_arguments, check_decompress, decompress),
}
