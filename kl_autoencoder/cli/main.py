"""kl-autoencoder encode | decode | evaluate | encode-dataset ...: what the command line looks like.

A command is first checked by checks.py, which imports nothing heavy: `--help` and what a mistake in a name comes to
are there at once. What it then does is in the other modules beside this one.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from ..extras import MissingExtra
from ..files import one_line
from ..progress import Progress, write
from . import checks

PROGRAM = "kl-autoencoder"
EXAMPLES = """examples:
  kl-autoencoder reconstruct photo.jpg -o reconstruction.png
  kl-autoencoder info runs/quickstart/export
  kl-autoencoder reconstruct photo.jpg --model runs/quickstart/export -o reconstruction.png --compare
  kl-autoencoder encode photos/ --model stabilityai/sd-vae-ft-mse -o latents.safetensors
  kl-autoencoder decode latents.safetensors -o decoded/
  kl-autoencoder evaluate --model runs/quickstart --data photos/ --size 256 -o report/
  kl-autoencoder export runs/quickstart -o vae.safetensors --single-file
  kl-autoencoder fp16-check stabilityai/sdxl-vae --fix -o sdxl-vae-fp16/
  accelerate launch -m kl_autoencoder encode-dataset --model vae/ --data photos/ --size 512 -o latents/
  kl-autoencoder interpolate a.jpg b.jpg --model vae/ -o strip.png
"""
IMAGES = (
    "Images are turned upright and converted to sRGB; transparency is laid over white; 16 bits are rounded to 8; "
    "of an animation or several pages the first is taken; integers of 32 bits are refused, for nothing says which "
    "is white."
)
PIPELINES = ["sd", "sdxl", "sd3", "flux"]
DTYPES = ["float32", "bfloat16", "float16"]
HOME = {  # of the commands that are not in model_commands.py
    "evaluate": "evaluate_command",
    **dict.fromkeys(("encode-dataset", "set-scaling"), "dataset_commands"),
    **dict.fromkeys(("interpolate", "sample", "attribute", "anomaly"), "latent_commands"),
}
MODEL = (
    "a diffusers VAE folder, a pipeline, a training run, a single .safetensors or .ckpt file, a hub id, or "
    "compact, the small model that comes with this program"
)

DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d{1,3})?")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TAKING_IMAGES = (
    *("encode", "reconstruct", "evaluate", "fp16-check", "encode-dataset"),
    *("interpolate", "sample", "attribute", "anomaly"),
)
ON_RANKS = ("evaluate", "encode-dataset")  # commands that several processes share


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, else 2 after one line on stderr (130 if interrupted).

    1 if all went well and a check found what it looks for.
    """
    show_traceback = "--traceback" in (sys.argv if argv is None else argv)
    try:
        arguments = _parser().parse_args(argv)
        command = arguments.command.replace("-", "_")
        getattr(checks, command)(arguments)
        _check_device(getattr(arguments, "device", None))
        if argv is None and arguments.command in ON_RANKS:
            from ..distributed import end_with_the_launcher, start_all_cpu_processes

            end_with_the_launcher()
            start_all_cpu_processes("kl_autoencoder", sys.argv[1:])
        with Progress("importing torch and diffusers"):
            module = import_module(f".{HOME.get(arguments.command, 'model_commands')}", __package__)
        with _warnings_in_one_line():
            return getattr(module, command)(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        say("error", _in_words(error))
        return 2


def _in_words(error: Exception) -> str:
    """What a user can cause is a ValueError or OSError that says it all; of the rest the kind is a hint."""
    by_safetensors = re.search(r"\(os error (\d+)\)", str(error))
    number = int(by_safetensors[1]) if by_safetensors else getattr(error, "errno", None)
    if number in DISK_FULL:
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        return f"{where}{os.strerror(number)}; free space there or write elsewhere; no half of a file is left"
    if isinstance(error, (ValueError, OSError, MissingExtra)):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _check_device(name: str | None) -> None:
    """Refuse a device that is none, or that torch, which is imported for this, does not have here."""
    if name in (None, "cpu"):
        return
    if not DEVICE.fullmatch(name):
        raise ValueError(f"--device: {name!r}; allowed: cpu, cuda, cuda:1, mps, xpu")
    import torch

    kind, _, index = name.partition(":")
    backend = getattr(torch, kind)
    count = backend.device_count() if backend.is_available() else 0
    if int(index or 0) >= count:
        found = f"{count} of that kind" if count else "none of that kind"
        raise ValueError(
            f"--device: {name!r}; torch {torch.__version__} finds {found} here; "
            "leave --device out for the best there is"
        )


def say(kind: str, message: object) -> None:
    """One line on stderr, whatever the message."""
    write(f"{PROGRAM}: {kind}: {one_line(message)}", sys.stderr)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Our own warnings as a line each; what libraries warn of is not for the reader of a command's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"kl_autoencoder\.")
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        yield


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for what it cannot parse, with the nearest word that it knows."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [word for word in unknown if word.startswith("-")]
            known = self.commands[parsed.command]._option_string_actions
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(options[:1], known)}")
        return parsed

    def error(self, message: str):
        if wrong := re.search(r"invalid choice: '([^']*)'", message):
            choices = [str(choice) for action in self._actions for choice in action.choices or ()]
            message += _nearest([wrong[1]], choices)
        raise ValueError(f"{message} (see {self.prog} --help)")


def _nearest(words: Sequence[str], known: Iterable[str]) -> str:
    found = [near for word in words for near in difflib.get_close_matches(word.split("=")[0], known, n=1)]
    return f"; did you mean {found[0]}?" if found else ""


class _Version(argparse.Action):
    """The package's version and those of what it computes with, read from their metadata."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        for name in ("torch", "diffusers", "safetensors", "pillow"):
            print(f"{name} {version(name)}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Encode photographs to latents and decode them with a KL-regularised autoencoder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="versions of this program and what it runs on")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    parser.commands = commands.choices

    _image_commands(commands)
    _evaluate(commands)
    _model_commands(commands)
    _dataset_commands(commands)
    _latent_commands(commands)
    for name in ("info", "fp16-check", "evaluate"):
        commands.choices[name].add_argument("--json", action="store_true", help="print what is found as JSON")
    for name in TAKING_IMAGES:
        commands.choices[name].epilog = IMAGES
    for sub in commands.choices.values():
        sub.add_argument(
            "--traceback", action="store_true", help="show where in the program an error is from"
        )
    return parser


def _image_commands(commands) -> None:
    sub = commands.add_parser("encode", help="photographs to latents")
    _photographs(sub)
    _model(sub)
    _computation(sub)
    sub.add_argument(
        "--sample", action="store_true", help="draw from the posterior instead of taking its mode"
    )
    sub.add_argument("--seed", type=int, default=0, help="of --sample; photograph i draws with seed + i (0)")
    sub.add_argument(
        "--scaled", action="store_true", help="scale the latents as diffusion models expect them"
    )
    _output(sub, "LATENTS.safetensors", "the file to write")

    sub = commands.add_parser("decode", help="latents back to photographs")
    sub.add_argument("latents", nargs="+", metavar="LATENTS", help="files written by encode")
    _model(sub, None, "the one that encoded them")
    _computation(sub)
    _output(sub, "PHOTO.png", "a picture, or a folder for several")

    sub = commands.add_parser("reconstruct", help="encode and decode photographs")
    _photographs(sub)
    _model(sub)
    _computation(sub)
    sub.add_argument(
        "--compare", action="store_true", help="original, reconstruction and difference side by side"
    )
    _output(sub, "OUT", "a picture, or a folder for several")


def _model_commands(commands) -> None:
    sub = commands.add_parser("export", help="write a trained model for use elsewhere")
    sub.add_argument("model", metavar="RUN", help=MODEL)
    sub.add_argument("--single-file", action="store_true", help="one .safetensors in LDM layout")
    _dtype(sub, None, "store in this type (default: as it is)")
    _output(sub, "OUT", "a folder for diffusers, or with --single-file a .safetensors file")

    sub = commands.add_parser(
        "info", help="what a model is: shapes, parameters, scaling, what it is made for"
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL)

    sub = commands.add_parser(
        "fp16-check",
        help="whether a model overflows in float16, and the same model that does not",
        description="Measures the largest value in each layer, in float32, on photographs and on hard images. "
        "Exit status: 0 if the model, or what --fix wrote, is safe in float16; 1 if it is not; 2 after an error.",
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument(
        "--images", metavar="FOLDER", help="measure on these photographs (default: a few of scikit-image)"
    )
    sub.add_argument("--size", type=_positive, default=256, metavar="N", help="of the images, N x N (256)")
    sub.add_argument("--fix", action="store_true", help="write the same model, rescaled to be safe, to -o")
    _device(sub)
    _output(sub, "FOLDER", "with --fix: a folder for diffusers", required=False)


def _evaluate(commands) -> None:
    sub = commands.add_parser(
        "evaluate",
        help="measure models on photographs: metrics.json, images.csv and report.html",
        description="Measures how well models reproduce photographs, beside bicubic, JPEG and WebP, and what their "
        "latents are like. On several processes with `accelerate launch -m kl_autoencoder evaluate ...`.",
    )
    sub.add_argument(
        "--model", required=True, action="append", metavar="MODEL", help=MODEL + "; may be repeated"
    )
    sub.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="a folder, parquet or .tar files, or a data set's hub id",
    )
    sub.add_argument(
        "--size",
        type=_size,
        default=256,
        metavar="N",
        help="scale the short side to N, crop the centre (256), or native",
    )
    _output(sub, "FOLDER", "where to write the report")
    sub.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    sub.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="one or more, side by side (float32)"
    )
    sub.add_argument("--lpips", choices=["alex", "squeeze", "vgg"], default="alex", help="its network (alex)")
    sub.add_argument(
        "--study-images", type=_positive, default=8, metavar="N", help="images for the studies of latents (8)"
    )
    sub.add_argument("--save-images", action="store_true", help="write what was measured as PNG files, too")
    sub.add_argument("--batch-size", type=_positive, default=4, metavar="N", help="images at a time (4)")
    sub.add_argument(
        "--seed", type=int, default=0, help="of samples and noise; image i draws with seed + i (0)"
    )
    sub.add_argument("--image-column", default="image", metavar="COLUMN", help="with the photographs (image)")
    sub.add_argument("--split", default="validation", help="the split of a data set on the hub (validation)")
    _device(sub)


def _dataset_commands(commands) -> None:
    sub = commands.add_parser(
        "encode-dataset",
        help="a data set to latents for diffusion training",
        description="Encodes a source of photographs into shards of parquet. Running the same command again "
        "continues, also on another number of ranks (accelerate launch, torchrun, srun, or by hand).",
    )
    _model(sub, required=True)
    _computation(sub)
    sub.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder, parquet or webdataset files, a hub id"
    )
    sub.add_argument("--size", type=_positive, required=True, metavar="N", help="of the crops, N x N pixels")
    sub.add_argument(
        "--crop", choices=["centre", "random", "buckets"], default="centre",
        help="which part; buckets: sizes of about N x N pixels by aspect ratio, as SDXL's (centre)",
    )  # fmt: skip
    sub.add_argument(
        "--content", choices=["moments", "sample", "mode"], default="moments",
        help="mean and logvar of the posterior, a draw from it, or its mode (moments)",
    )  # fmt: skip
    sub.add_argument(
        "--store", dest="stored_as", choices=["float16", "bfloat16", "float32"], default="float16",
        help="store in this type (float16)",
    )  # fmt: skip
    sub.add_argument("--flip", action="store_true", help="the mirrored photographs' latents too")
    sub.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns to take along")
    sub.add_argument("--image-column", default="image", metavar="COLUMN", help="with the photographs (image)")
    sub.add_argument("--split", default="train", help="of a hub or saved data set (train)")
    sub.add_argument("--seed", type=int, default=0, help="of random crops and samples (0)")
    sub.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="photographs at once (16)")
    sub.add_argument(
        "--shard-rows", type=_positive, default=512, metavar="N", help="photographs a shard (512)"
    )
    sub.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read, a rank (2)")
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="a folder of its own")

    sub = commands.add_parser("set-scaling", help="the statistics of encode-dataset into the model's config")
    sub.add_argument(
        "model", metavar="MODEL", help="the folder of the model that encoded, or its training run"
    )
    sub.add_argument("--from", dest="latents", required=True, metavar="OUT", help="what encode-dataset wrote")
    sub.add_argument(
        "--for",
        dest="pipeline",
        choices=PIPELINES,
        help="write what this kind of pipeline reads: the scaling factor (sd), also means of channels with "
        "--per-channel (sdxl), the scaling factor and the shift (sd3, flux)",
    )
    sub.add_argument(
        "--per-channel", action="store_true", help="a mean and a std for each channel, instead of one for all"
    )


def _latent_commands(commands) -> None:
    size = {"type": _positive, "metavar": "N"}

    sub = commands.add_parser("interpolate", help="a strip of pictures between two photographs")
    sub.add_argument("a", metavar="A", help="a photograph")
    sub.add_argument("b", metavar="B", help="another, which is cropped to the size of A")
    _model(sub)
    sub.add_argument("--steps", type=int, default=8, metavar="N", help="pictures, A and B included (8)")
    sub.add_argument("--spherical", action="store_true", help="along an arc, which keeps the latents' norm")
    sub.add_argument("--size", **size, help="crop both to squares of N x N")
    _device(sub)
    _output(sub, "STRIP.png", "a picture")

    sub = commands.add_parser(
        "sample", help="decoded draws from the prior, or from a Gaussian fitted to data"
    )
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument("--data", metavar="SOURCE", help="photographs for --fit: a folder, parquet, a hub id")
    sub.add_argument(
        "--fit", choices=["channel", "position"], help="a mean and variance for each channel or value"
    )
    sub.add_argument("--size", **size, help="of the pictures (what the model is made for)")
    sub.add_argument("--grid", type=_positive, default=4, metavar="N", help="N x N draws (4)")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    _device(sub)
    _output(sub, "GRID.png", "a picture")

    sub = commands.add_parser("attribute", help="add to a photograph what two sets of photographs differ by")
    sub.add_argument("photograph", metavar="PHOTO", help="the photograph to change")
    sub.add_argument("--plus", required=True, metavar="SOURCE", help="photographs with the attribute")
    sub.add_argument("--minus", required=True, metavar="SOURCE", help="photographs without it")
    sub.add_argument(
        "--strength", type=float, nargs="+", default=[0.0, 1.0], help="how often to add it (0 1)"
    )
    _model(sub)
    sub.add_argument("--size", **size, help="crop all to squares of N x N (what the model is made for)")
    _device(sub)
    _output(sub, "STRIP.png", "a picture")

    sub = commands.add_parser("anomaly", help="score photographs by how strange they are to a model")
    sub.add_argument("model", metavar="MODEL", help=MODEL)
    sub.add_argument("--reference", required=True, metavar="SOURCE", help="ordinary photographs")
    sub.add_argument("--data", required=True, metavar="SOURCE", help="photographs to score")
    sub.add_argument("--labels", metavar="FILE.csv", help="lines of name,0 (ordinary) or name,1 (strange)")
    sub.add_argument("--size", **size, help="crop all to squares of N x N (what the model is made for)")
    _device(sub)
    _output(sub, "SCORES.csv", "with labels, SCORES.roc.csv too")


def _photographs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("photographs", nargs="+", metavar="PHOTO", help="photographs and folders of them")
    sub.add_argument(
        "--size", type=_positive, metavar="N", help="scale the short side to N, crop the centre square"
    )


def _model(
    sub: argparse.ArgumentParser,
    default: str | None = "compact",
    told: str = "compact",
    required: bool = False,
) -> None:
    help = MODEL if required else f"{MODEL} (default: {told})"
    sub.add_argument("--model", default=default, required=required, metavar="MODEL", help=help)


def _computation(sub: argparse.ArgumentParser) -> None:
    _device(sub)
    _dtype(sub, "float32", "compute in this type (default: float32)")


def _device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")


def _dtype(sub: argparse.ArgumentParser, default: str | None, help: str) -> None:
    sub.add_argument("--dtype", choices=DTYPES, default=default, help=help)


def _output(sub: argparse.ArgumentParser, metavar: str, help: str, required: bool = True) -> None:
    sub.add_argument("-o", "--output", required=required, metavar=metavar, help=help)
    sub.add_argument("--overwrite", action="store_true", help="replace what is there already")


def _size(text: str) -> int | None:
    return None if text == "native" else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
