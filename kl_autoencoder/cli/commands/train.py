"""train: the training program, with everything that `python -m train` takes."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[3]  # the folder that this package and the training program lie in
HELP = "train a model; takes what python -m train takes, and continues where that stopped"


def train(arguments: list[str]) -> int:
    """Run the training program, which the library knows by its name alone; its exit code."""
    spec = find_spec("train")
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    if origin is None:
        raise ValueError(f"train: the training program is not installed beside kl_autoencoder in {PACKAGES}")
    if origin.parent.parent != PACKAGES:
        raise ValueError(f"train: {origin} has the training program's name; start it from another folder")
    return import_module("train.__main__").start(arguments, "kl-autoencoder train")
