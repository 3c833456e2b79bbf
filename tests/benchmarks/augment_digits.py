"""Do variants help a classifier of few digits? Logistic regression and nearest neighbour, with and without them.

    python -m tests.benchmarks.augment_digits --model runs/digits -o results/augment-digits.json

The labelled digits are drawn from `sample-digits`'s training split, so many of each class; accuracy is on its 297
validation digits. The model may have seen all 1,500 training digits, without labels unless it has classes.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from kl_autoencoder.cli.main import main as command
from kl_autoencoder.data.samples.installed import digits
from kl_autoencoder.data.samples.tables import TRAIN_DIGITS

CLASSIFIERS = ("logistic regression", "nearest neighbour")


def chosen(per_class: int, seed: int) -> np.ndarray:
    """Numbers of training digits, so many of each class."""
    rng, labels = np.random.default_rng(seed), digits()[1][:TRAIN_DIGITS]
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)])


def write(folder: Path, numbers: np.ndarray) -> None:
    """The digits as PNG in a folder a class."""
    images, labels = digits()
    for number in numbers:
        path = folder / str(labels[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(path)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 64) in [0, 1] and classes (N,) of a folder a class."""
    paths = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    return pixels.reshape(len(paths), -1), np.array([int(path.parent.name) for path in paths])


def accuracies(pixels: np.ndarray, classes: np.ndarray) -> list[float]:
    """On the validation digits, of each of `CLASSIFIERS` trained on these."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = digits()
    held_out = images[TRAIN_DIGITS:].reshape(-1, 64) / 255
    models = (LogisticRegression(max_iter=2000), KNeighborsClassifier(1))
    return [float(model.fit(pixels, classes).score(held_out, labels[TRAIN_DIGITS:])) for model in models]


def compare(model: str, per_class: int, seed: int, each: int, kinds: list[str]) -> dict[str, list[float]]:
    """Accuracies without variants, and with those of each kind beside the digits."""
    with tempfile.TemporaryDirectory() as scratch:
        few = Path(scratch) / "few"
        write(few, chosen(per_class, seed))
        pixels, classes = read(few)
        found = {"without": accuracies(pixels, classes)}
        for kind in kinds:
            more = Path(scratch) / kind
            arguments = ["augment", str(few), "--model", model, "--kinds", kind, "--each", str(each)]
            with contextlib.redirect_stdout(io.StringIO()):
                if command([*arguments, "--seed", str(seed), "-o", str(more)]):
                    raise SystemExit(f"kl-autoencoder {' '.join(arguments)} failed")
            added = read(more)
            found[kind] = accuracies(np.concatenate([pixels, added[0]]), np.concatenate([classes, added[1]]))
    return found


def rows(runs: list[dict[str, list[float]]], per_class: int) -> dict[str, dict[str, float]]:
    """Mean accuracies over the draws of digits; gains over those without variants, with standard errors."""
    found = {}
    for kind in runs[0]:
        values = np.array([run[kind] for run in runs])
        gains = values - np.array([run["without"] for run in runs])
        for i, classifier in enumerate(CLASSIFIERS):
            accuracy, gain = values[:, i].mean(), gains[:, i].mean()
            error = gains[:, i].std(ddof=1) / len(runs) ** 0.5
            name = f"{per_class} a class, {classifier}, {kind}"
            found[name] = {"accuracy": accuracy, "gain": gain, "error": error}
            print(f"{name:<44} {accuracy:.3f}, gain {gain:+.3f} +- {error:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", nargs="+", default=["noise", "between"])
    parser.add_argument("--per-class", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--seeds", type=int, default=4, help="draws of labelled digits (4)")
    parser.add_argument("--each", type=int, default=5, help="variants of each kind a digit (5)")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    table = {}
    for per_class in given.per_class:
        seeds = range(given.seeds)
        runs = [compare(given.model, per_class, seed, given.each, given.kinds) for seed in seeds]
        table |= rows(runs, per_class)
    if given.output:
        settings = {"each": given.each, "seeds": given.seeds, "rows": table}
        given.output.write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
