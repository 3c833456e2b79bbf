"""The program `kl-autoencoder`: find the command, check its arguments, run it, and print errors as one line.

Arguments and work of a command are in the module of its family. Nothing heavy is imported before the arguments are
checked, so that `--help` and messages about mistakes appear at once.
"""

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from ..console import PROGRAM, quiet_without_a_reader, reader_is_gone, say
from ..extras import MissingExtra
from ..progress import Progress
from .commands import (
    anomaly,
    attribute,
    codec,
    demo,
    evaluate,
    export,
    float16,
    images,
    latent_space,
    models,
    study,
    train,
)
from .commands.data_sets import augment, latent_datasets
from .parser import Command, Parser, Version

EXAMPLES = """examples:
  kl-autoencoder reconstruct photo.jpg -o reconstruction.png
  kl-autoencoder info runs/quickstart/export
  kl-autoencoder reconstruct photo.jpg --model runs/quickstart/export -o reconstruction.png --compare
  kl-autoencoder encode photos/ --model stabilityai/sd-vae-ft-mse -o latents.safetensors
  kl-autoencoder decode latents.safetensors -o decoded/
  kl-autoencoder compress photos/ -o compressed/ --bytes 5000
  kl-autoencoder decompress compressed/ -o photos-again/
  kl-autoencoder evaluate --model runs/quickstart --data photos/ --size 256 -o report/
  kl-autoencoder export runs/quickstart -o vae.safetensors --single-file
  kl-autoencoder export compact -o onnx/ --onnx
  kl-autoencoder push runs/a --to me/my-vae --license mit --dry-run -o published/
  kl-autoencoder fp16-check stabilityai/sdxl-vae --fix -o sdxl-vae-fp16/
  accelerate launch -m kl_autoencoder encode-dataset --model vae/ --data photos/ --size 512 -o latents/
  kl-autoencoder interpolate a.jpg b.jpg --model vae/ -o strip.png
  kl-autoencoder augment digits/ --model runs/digits -o more-digits/
  kl-autoencoder train configs/quickstart.yaml
"""
FAMILIES = (
    images,
    demo,
    codec,
    evaluate,
    study,
    export,
    models,
    float16,
    latent_datasets,
    latent_space,
    attribute,
    augment,
    anomaly,
)
COMMANDS: dict[str, Command] = {name: c for family in FAMILIES for name, c in family.COMMANDS.items()}

DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d{1,3})?")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # the exit code of shells: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: success. 1: success, and a check found the problem that it looks for. 2: an error, printed as one line on
    stderr. 130: interrupted. `train` returns the training program's exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with quiet_without_a_reader():
        try:
            if words[:1] == ["train"]:
                return train.train(words[1:])
            return _run(words, launched=argv is None)
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and reader_is_gone():
                raise
            if "--traceback" in words:
                traceback.print_exc()
            say("error", _in_words(error))
            return 2


def _run(words: list[str], launched: bool) -> int:
    """Check and run one command; `launched`: this is a process of its own, perhaps one of several."""
    arguments = build_parser().parse_args(words)
    command = COMMANDS[arguments.command]
    command.check(arguments)
    _check_device(getattr(arguments, "device", None))
    if launched and command.on_ranks:
        from ..distributed import end_with_the_launcher, start_all_cpu_processes

        end_with_the_launcher()
        start_all_cpu_processes("kl_autoencoder", words)
    with Progress("importing torch and diffusers"):
        import_module(".loading", __package__)
    with _warnings_in_one_line():
        return command.run(arguments) or 0


def build_parser() -> Parser:
    """The parser of all commands; the arguments of `train` are left to the training program."""
    parser = Parser(
        prog=PROGRAM,
        description="Encode photographs to latents and decode them with a KL-regularised autoencoder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, help="versions of this program and what it runs on")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.description, epilog=command.epilog
        )
        command.arguments(sub)
        sub.add_argument(
            "--traceback", action="store_true", help="show where in the program an error is from"
        )
    commands.add_parser("train", help=train.HELP)
    parser.commands = commands.choices
    return parser


def _in_words(error: Exception) -> str:
    """The message of an error; for errors other than ValueError, OSError and MissingExtra it names their kind."""
    by_safetensors = re.search(r"\(os error (\d+)\)", str(error))
    number = int(by_safetensors[1]) if by_safetensors else getattr(error, "errno", None)
    if number in DISK_FULL:
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        return f"{where}{os.strerror(number)}; free space there or write elsewhere; no half of a file is left"
    if isinstance(error, (ValueError, OSError, MissingExtra)):
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _check_device(name: str | None) -> None:
    """Raise ValueError for an unknown device, and for one that torch does not find here; cpu needs no torch."""
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


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print this package's warnings as one line each, and drop those of libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"kl_autoencoder\.")
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        yield
