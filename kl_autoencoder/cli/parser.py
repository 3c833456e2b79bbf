"""`Command`, the parser, which reports a mistake in one line, and the arguments that several commands share."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..console import PROGRAM

MODEL = (
    "a diffusers VAE folder, a pipeline, a training run, a single .safetensors or .ckpt file, a hub id, or "
    "compact or compact-codec, the small models that come with this program"
)
DTYPES = ["float32", "bfloat16", "float16"]
IMAGES = (
    "Images are turned upright and converted to sRGB; transparency is laid over white; 16 bits are rounded to 8; "
    "of an animation or several pages the first is taken; integers of 32 bits are refused, for nothing says which "
    "is white."
)


class Parser(argparse.ArgumentParser):
    """Raises ValueError for what it cannot parse, and suggests the nearest known word."""

    commands: dict[str, "Parser"]  # the commands' parsers; only the program's parser has them

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.commands[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)  # argparse's own method ignores a broken pipe

    def error(self, message: str):
        if wrong := re.search(r"invalid choice: '([^']*)'", message):
            near = nearest(wrong[1], [str(c) for action in self._actions for c in action.choices or ()])
            message = re.sub(r" \(choose from .*\)", near, message) if near else message
        elif wrong := re.search(r"unrecognized arguments:.*? (-\S+)", message):
            message += nearest(wrong[1].split("=")[0], self._option_string_actions)
        raise ValueError(f"{message} (see {self.prog} --help)")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message, such as "; did you mean encode?", or "" if no known word is similar."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


class Command(NamedTuple):
    """A command: its help, its arguments, its check and its work.

    `arguments` declares them on a parser. `check` is called before torch is imported: it raises ValueError or
    OSError for names and files that `run` could not use, and may replace arguments by what they name, such as a
    folder by its photographs. `run` returns None or an exit code.
    """

    help: str
    arguments: Callable[[Parser], None]
    check: Callable[[argparse.Namespace], None]
    run: Callable[[argparse.Namespace], int | None]
    description: str | None = None
    epilog: str | None = None
    on_ranks: bool = False  # whether several processes can share its work


class Version(argparse.Action):
    """Print the versions of this package and of the packages it computes with, from their metadata, and exit."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        for name in (PROGRAM, "torch", "diffusers", "safetensors", "pillow"):
            print(f"{name} {version(name)}")
        parser.exit()


# -------------------------------------------------------------------- arguments that many commands have


def add_photographs(parser: Parser) -> None:
    parser.add_argument("photographs", nargs="+", metavar="PHOTO", help="photographs and folders of them")
    parser.add_argument(
        "--size", type=positive, metavar="N", help="scale the short side to N, crop the centre square"
    )


def add_model(parser: Parser, default: str | None = "compact", told: str | None = None) -> None:
    """Add the option --model; `told` is its default in the help text, if not `default`."""
    parser.add_argument(
        "--model", default=default, metavar="MODEL", help=f"{MODEL} (default: {told or default})"
    )


def add_computation(parser: Parser) -> None:
    add_device(parser)
    add_dtype(parser, "float32", "compute in this type (default: float32)")


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")


def add_dtype(parser: Parser, default: str | None, help: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=help)


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print what is found as JSON")


def add_output(parser: Parser, metavar: str, help: str, required: bool = True) -> None:
    parser.add_argument("-o", "--output", required=required, metavar=metavar, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")


def positive(text: str) -> int:
    """Type of an option: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
