"""python -m train CONFIG.yaml [key=value ...]: parse, build, fit."""

import argparse
import sys

from kl_autoencoder.launching import end_with_the_launcher, start_all_cpu_processes

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train a KL autoencoder. Running the same command again continues where it stopped.",
        epilog="example: python -m train configs/kl_f8.yaml data.train=FOLDER train.steps=200 output_dir=runs/a",
    )
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    arguments = parser.parse_args(argv)
    try:
        from .config import load_config

        config = load_config(arguments.config, arguments.overrides)
        from .trainer import TooManyBadSteps, Trainer

        trainer = Trainer(config)
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    try:
        summary = trainer.fit()
    except (OSError, TooManyBadSteps) as error:
        print_error(error)
        return 1
    if summary is None:
        return STOPPED
    if trainer.is_main:
        print_summary(summary)
    return 0


def print_error(error: Exception) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)  # on one line, whoever raised it


def print_summary(summary: dict) -> None:
    print(f"\n{'held-out images':<18}" + "".join(f"{name.upper():>10}" for name in summary["after"]))
    for name in ("before", "after"):
        print(f"{name + ' training':<18}" + "".join(f"{value:>10.3f}" for value in summary[name].values()))
    print(f"pictures  {summary['picture']}\nexport    {summary['export']}")


if __name__ == "__main__":
    end_with_the_launcher()
    start_all_cpu_processes("train", sys.argv[1:])
    sys.exit(main())
