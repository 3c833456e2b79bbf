"""encode, decode, reconstruct: photographs to latents and back."""

import argparse
import json
from pathlib import Path

from ...data.formats import LATENTS_KEY
from ...files import read_metadata
from ...progress import tracked
from ..parser import IMAGES, Command, Parser, add_computation, add_model, add_output, add_photographs
from ..paths import check_model, find_photographs, inside, plan_targets, refuse_existing


def encode_arguments(parser: Parser) -> None:
    add_photographs(parser)
    add_model(parser)
    add_computation(parser)
    parser.add_argument(
        "--sample", action="store_true", help="draw from the posterior instead of taking its mode"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --sample; photograph i draws with seed + i (0)"
    )
    parser.add_argument(
        "--scaled", action="store_true", help="scale the latents as diffusion models expect them"
    )
    add_output(parser, "LATENTS.safetensors", "the file to write")


def check_encode(arguments: argparse.Namespace) -> None:
    """`photographs` become (path, name) pairs, `output` a Path."""
    arguments.photographs, arguments.output = find_photographs(arguments.photographs), Path(arguments.output)
    if arguments.output.suffix != ".safetensors":
        raise ValueError(f"{arguments.output}: latents are written to a .safetensors file")
    refuse_existing([arguments.output], [path for path, _ in arguments.photographs], arguments.overwrite)
    check_model(arguments.model)


def encode(arguments: argparse.Namespace) -> None:
    """Encode photographs into one file of latents: the posterior's mode, or a sample of it."""
    import torch

    from ...latents.latent_files import save_latents
    from ..loading import load_model, padded, read_photographs, refuse_unread

    photographs, output = arguments.photographs, arguments.output
    vae = load_model(arguments.model, arguments.device, arguments.dtype)
    latents, names, sizes, unread = [], [], [], []
    for i, images in read_photographs(photographs, arguments.size, unread, "encoding", vae):
        with torch.inference_mode():
            posterior = vae.encode(padded(images, vae)).latent_dist
            generator = torch.Generator(vae.device).manual_seed(arguments.seed + i)
            z = posterior.sample(generator) if arguments.sample else posterior.mode()
            z = vae.scale(z) if arguments.scaled else z
        if not z.isfinite().all():
            raise ValueError(f"{photographs[i][0]}: its latents are not finite; try --dtype float32")
        latents.append(z[0].cpu())
        names.append(photographs[i][1])
        sizes.append(tuple(images.shape[2:]))
    if latents:
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"config": vae.scaling, "model": arguments.model, "scaled": arguments.scaled}
        save_latents(output, latents, names, sizes, **about)
        print(f"{output}: {len(latents)} photograph{'s' * (len(latents) > 1)}")
    refuse_unread(unread, photographs)


def decode_arguments(parser: Parser) -> None:
    parser.add_argument("latents", nargs="+", metavar="LATENTS", help="files written by encode")
    add_model(parser, None, "the one that encoded them")
    add_computation(parser)
    add_output(parser, "PHOTO.png", "a picture, or a folder for several")


def check_decode(arguments: argparse.Namespace) -> None:
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


def decode(arguments: argparse.Namespace) -> None:
    """Decode files of latents to photographs of their original sizes."""
    import torch

    from ...latents.latent_files import load_latents
    from ..loading import load_model, prepare_memory, write_picture

    files = [(path, load_latents(path)) for path in arguments.latents]
    targets, models = tracked(arguments.targets, "decoding", "images"), {}
    for source, file in files:
        name = arguments.model or file.model
        if name not in models:
            models[name] = load_model(name, arguments.device, arguments.dtype)
        vae = models[name]
        for z, size, photograph in zip(file.raw(), file.sizes, file.names, strict=True):
            if z.shape[0] != vae.config.latent_channels:
                channels = f"{z.shape[0]} channels, {name} takes {vae.config.latent_channels}"
                raise ValueError(f"{source}: latents of {channels}")
            pixels = tuple(vae.downsampling * side for side in z.shape[1:])
            prepare_memory(vae, f"{source}: {photograph}", pixels)
            with torch.inference_mode():
                images = vae.decode(z[None].to(vae.device, vae.dtype)).sample
            write_picture(images, next(targets), photograph, size)


def reconstruct_arguments(parser: Parser) -> None:
    add_photographs(parser)
    add_model(parser)
    add_computation(parser)
    parser.add_argument(
        "--compare", action="store_true", help="original, reconstruction and difference side by side"
    )
    add_output(parser, "OUT", "a picture, or a folder for several")


def check_reconstruct(arguments: argparse.Namespace) -> None:
    """`photographs` become (path, name) pairs; adds `targets`, a path for each."""
    single = len(arguments.photographs) == 1 and not Path(arguments.photographs[0]).is_dir()
    photographs = find_photographs(arguments.photographs)
    arguments.targets = plan_targets(arguments.output, [name for _, name in photographs], single)
    refuse_existing(arguments.targets, [path for path, _ in photographs], arguments.overwrite)
    check_model(arguments.model)
    arguments.photographs = photographs


def reconstruct(arguments: argparse.Namespace) -> None:
    """Encode and decode photographs, and write the reconstructions in their sizes."""
    import torch

    from ...data.image_io import DIFFERENCE_GAIN, difference_image, image_grid
    from ..loading import load_model, padded, read_photographs, refuse_unread, write_picture

    photographs, targets, unread = arguments.photographs, arguments.targets, []
    vae = load_model(arguments.model, arguments.device, arguments.dtype)
    for i, images in read_photographs(photographs, arguments.size, unread, "reconstructing", vae):
        height, width = images.shape[2:]
        with torch.inference_mode():
            output = vae(padded(images, vae)).sample[:, :, :height, :width].float().cpu()
        if arguments.compare:
            columns = [images, output, difference_image(images, output.clamp(-1, 1))]
            output = image_grid(columns, ["original", "reconstruction", f"difference x{DIFFERENCE_GAIN:g}"])
        write_picture(output, targets[i], photographs[i][1])
    refuse_unread(unread, photographs)


COMMANDS = {
    "encode": Command("photographs to latents", encode_arguments, check_encode, encode, epilog=IMAGES),
    "decode": Command("latents back to photographs", decode_arguments, check_decode, decode),
    "reconstruct": Command(
        "encode and decode photographs", reconstruct_arguments, check_reconstruct, reconstruct, epilog=IMAGES
    ),
}
