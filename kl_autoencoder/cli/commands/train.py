"""train: start the training program, with the arguments of `python -m train`."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[3]  # the folder that this package and the training program lie in
HELP = "train a model; takes what python -m train takes, and continues where that stopped"


def train(arguments: list[str]) -> int:
    """Run the training program and return its exit code. It is found by name, as the library does not depend on it.

    Raises ValueError if it is not installed beside this package, or another module has its name.
    """
    spec = find_spec("train")
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    if origin is None:
        raise ValueError(f"train: the training program is not installed beside kl_autoencoder in {PACKAGES}")
    if origin.parent.parent != PACKAGES:
        raise ValueError(f"train: {origin} has the training program's name; start it from another folder")
    return import_module("train.__main__").start(arguments, "kl-autoencoder train")
