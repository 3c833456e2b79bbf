"""kl-autoencoder encode | decode | reconstruct | export | info | fp16-check: what the command line looks like.

The commands themselves are in commands.py, which is imported when one runs: `--help` answers at once.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PROGRAM = "kl-autoencoder"
EXAMPLES = """examples:
  kl-autoencoder reconstruct photo.jpg -o reconstruction.png
  kl-autoencoder info runs/quickstart/export
  kl-autoencoder reconstruct photo.jpg --model runs/quickstart/export -o reconstruction.png --compare
  kl-autoencoder encode photos/ --model stabilityai/sd-vae-ft-mse -o latents.safetensors
  kl-autoencoder decode latents.safetensors -o decoded/
  kl-autoencoder export runs/quickstart -o vae.safetensors --single-file
  kl-autoencoder fp16-check stabilityai/sdxl-vae --fix -o sdxl-vae-fp16/
"""
MODEL = (
    "a diffusers VAE folder, a pipeline, a training run, a single .safetensors or .ckpt file, a hub id, or "
    "compact, the small model that comes with this program"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, else 2 after one line on stderr (130 if interrupted).

    1 if all went well and a check found what it looks for.
    """
    try:
        arguments = _parser().parse_args(argv)
        from . import commands

        with _warnings_in_one_line():
            return getattr(commands, arguments.command.replace("-", "_"))(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # What a user can cause is a ValueError or OSError that says it all; of the rest the kind is a hint.
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        say("error", f"{kind}{error}")
        return 2


def say(kind: str, message: object) -> None:
    """One line on stderr, whatever the message."""
    print(f"{PROGRAM}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Our own warnings as a line each; what libraries warn of is not for the reader of a command's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"kl_autoencoder\.")
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Encode photographs to latents and decode them with a KL-regularised autoencoder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    sub = commands.add_parser("encode", help="photographs to latents")
    _photographs(sub)
    _model(sub)
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
    _output(sub, "PHOTO.png", "a picture, or a folder for several")

    sub = commands.add_parser("reconstruct", help="encode and decode photographs")
    _photographs(sub)
    _model(sub)
    sub.add_argument(
        "--compare", action="store_true", help="original, reconstruction and difference side by side"
    )
    _output(sub, "OUT", "a picture, or a folder for several")

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
    return parser


def _photographs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("photographs", nargs="+", metavar="PHOTO", help="photographs and folders of them")
    sub.add_argument(
        "--size", type=_positive, metavar="N", help="scale the short side to N, crop the centre square"
    )


def _model(sub: argparse.ArgumentParser, default: str | None = "compact", told: str = "compact") -> None:
    sub.add_argument("--model", default=default, metavar="MODEL", help=f"{MODEL} (default: {told})")
    _device(sub)
    _dtype(sub, "float32", "compute in this type (default: float32)")


def _device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")


def _dtype(sub: argparse.ArgumentParser, default: str | None, help: str) -> None:
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default, help=help)


def _output(sub: argparse.ArgumentParser, metavar: str, help: str, required: bool = True) -> None:
    sub.add_argument("-o", "--output", required=required, metavar=metavar, help=help)
    sub.add_argument("--overwrite", action="store_true", help="replace what is there already")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
