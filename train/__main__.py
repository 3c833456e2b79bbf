"""The training program: `python -m train CONFIG.yaml [key=value ...]`, or `kl-autoencoder train`."""

import os
import sys

from kl_autoencoder.cli.parser import Parser
from kl_autoencoder.console import quiet_without_a_reader
from kl_autoencoder.distributed import (
    end_with_the_launcher,
    rank_of,
    share_the_cores,
    start_all_cpu_processes,
)
from kl_autoencoder.extras import MissingExtra, require
from kl_autoencoder.files import one_line

# exit codes
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues


def start(argv: list[str], prog: str = "python -m train") -> int:
    """Set up this process, which may be one of several that a launcher started, and run `main`."""
    share_the_cores()
    end_with_the_launcher()
    start_all_cpu_processes("train", argv)
    return main(argv, prog)


def main(argv: list[str] | None = None, prog: str = "python -m train") -> int:
    """Train, or print what was asked for; returns the exit code. An error is one line on stderr."""
    with quiet_without_a_reader():
        try:
            arguments = _parser(prog).parse_intermixed_args(argv)
            require("train")
            if arguments.keys:
                from .config.keys import describe

                print(describe())
                return 0
            if arguments.config is None:
                raise ValueError("no configuration; allowed: a YAML file, such as configs/quickstart.yaml")
            from .config import load_config, to_yaml

            config = load_config(arguments.config, arguments.overrides)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:  # while modules are imported, which may take half a minute
            return interrupted()
        except (ValueError, OSError, MissingExtra) as error:
            print_error(error)
            return 2
        if arguments.print:
            print(to_yaml(config), end="")
            return 0
        return smoke(config) if arguments.smoke else run(config)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Train an autoencoder, or what the key `task` of the configuration names. Running the same "
        "command again continues where it stopped.",
        epilog=f"example: {prog} configs/kl_f8.yaml data.train=FOLDER output_dir=runs/a",
    )
    parser.add_argument("config", nargs="?", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="take every part of the recipe through a few steps, tiny, on any machine, and leave nothing behind",
    )
    parser.add_argument("--keys", action="store_true", help="print every key: type, range, default, meaning")
    parser.add_argument("--print", action="store_true", help="print the resolved configuration and end")
    return parser


def smoke(config) -> int:
    """Run all phases of a recipe at tiny sizes, in a folder that is then removed; returns the exit code."""
    from .smoke import replaced, smoke_run

    is_main = rank_of(os.environ)[0] == 0
    with smoke_run(config) as small:
        for line in replaced(config, small) if is_main else ():
            print(line)
        code = run(small, small=True)
    if is_main:
        print("smoke test passed; nothing is kept" if code == 0 else "smoke test failed")
    return code


def run(config, small: bool = False) -> int:
    """Train to the end, export and print the summary; returns the exit code. An error is one line on stderr."""
    try:
        return _run(config, small)
    except KeyboardInterrupt:  # outside of the loop; in the loop SIGINT is a request to stop (`StopRequest`)
        return interrupted()


def _run(config, small: bool) -> int:
    try:
        from .data.loader import LoaderFailed
        from .loop.trainer import TooManyBadSteps, Trainer
        from .tasks import task_maker

        trainer = Trainer(config, task_maker(config, small))
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    try:
        summary = trainer.fit()
    except LoaderFailed as error:  # all ranks raise it
        if trainer.is_main:
            print_error(error)
        return 1
    except (OSError, TooManyBadSteps) as error:
        print_error(error)
        return 1
    if summary is None:
        return STOPPED
    if trainer.is_main:
        print_summary(summary)
    return 0


def interrupted() -> int:
    """Print that the program was interrupted; returns the exit code."""
    print("\ninterrupted; the same command continues", file=sys.stderr)
    return INTERRUPTED


def print_error(error: Exception) -> None:
    print("error:", one_line(error), file=sys.stderr)  # on one line, whoever raised it


def print_summary(summary: dict) -> None:
    print(f"\n{'held-out images':<18}" + "".join(f"{name.upper():>10}" for name in summary["after"]))
    for name in ("before", "after"):
        print(f"{name + ' training':<18}" + "".join(f"{value:>10.3f}" for value in summary[name].values()))
    if summary["picture"].is_file():  # not every task draws one
        print(f"pictures  {summary['picture']}")
    print(f"export    {summary['export']}")


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
