"""Does a beta above 1 disentangle? MIG and DCI on sample-shapes, for some betas and three seeds each.

    python -m tests.benchmarks.beta_shapes -o runs/beta_shapes --betas 1 2 4 8 --seeds 0 1 2

Each run is the trainer's own, of RECIPE or of --config, with `loss.kl.weight` and `seed` set. What is there already
is not trained again: the same command goes on where it was stopped, in the middle of a run too. table.md and
rate_distortion.png are written after every run.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import yaml

from kl_autoencoder.cli.labelled_images import KEYS
from kl_autoencoder.data.image_io import load_image, open_image
from kl_autoencoder.data.sources import column_values, encoded_file, open_source
from kl_autoencoder.evaluation.pictures import plots, style
from kl_autoencoder.evaluation.variational.disentanglement import dci, mutual_information_gap
from kl_autoencoder.evaluation.variational.measures import Images, bounds, encode, information
from kl_autoencoder.files import replacing
from kl_autoencoder.models.classes import class_of

FACTORS = ("kind", "scale", "rotation", "x", "y", "hue")
IMAGES = 2000  # of the training images: MIG and DCI describe a representation, as in Locatello et al. 2019
COLUMNS = ("mig", "disentanglement", "completeness", "informativeness", "active_units", "rate", "distortion")
RECIPE = """
model:
  network: mlp
  hidden_sizes: [256, 128]
  in_channels: 3
  out_channels: 3
  latent_channels: 10
  sample_size: 16
data:
  train: sample-shapes
  validation: sample-shapes
  resolution: 16
  crop_scale: [1, 1]
  horizontal_flip: false
  batch_size: 64
  num_workers: 0
loss:
  reconstruction: bernoulli
  perceptual: {weight: 0}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 100, schedule: cosine}
train: {steps: 4000}
validation: {every: 0, pictures: 8}
checkpoint: {every: 1000, keep_last: 1}
log: {every: 50, tensorboard: false}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--betas", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, help="a recipe instead of this module's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as train.steps=500")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    recipe = output / "recipe.yaml"
    recipe.write_text(arguments.config.read_text() if arguments.config else RECIPE)
    found: dict[float, list[dict[str, float]]] = {}
    for seed in arguments.seeds:  # all betas first, so that an early end leaves something to compare
        for beta in arguments.betas:
            folder = output / f"beta{beta:g}-seed{seed}"
            found.setdefault(beta, []).append(_measured(folder, recipe, beta, seed, arguments.set))
            _report(found, output)


def _measured(folder: Path, recipe: Path, beta: float, seed: int, overrides: list[str]) -> dict[str, float]:
    """Train and measure, unless that is done already."""
    results = folder / "disentanglement.json"
    if not results.is_file():
        keys = [f"output_dir={folder}", f"loss.kl.weight={beta:g}", f"seed={seed}", *overrides]
        subprocess.run([sys.executable, "-m", "train", str(recipe), *keys], check=True)
        with replacing(results) as path:
            path.write_text(json.dumps(measures(folder)) + "\n")
    return json.loads(results.read_text())


def measures(folder: Path) -> dict[str, float]:
    """MIG and DCI of the posterior means of a run's model, and what its latents hold."""
    model = class_of(folder / "export").from_pretrained(folder / "export").eval().requires_grad_(False)
    rows = open_source("sample-shapes", KEYS, keep=FACTORS, in_order=True)
    size = model.config.sample_size
    images = [load_image(open_image(encoded_file(rows[i]["image"], str(i))), size) for i in range(IMAGES)]
    factors = np.array([column_values(rows, name)[:IMAGES] for name in FACTORS]).T
    data = Images(torch.cat(images))
    encoded = encode(model, data)
    scores = dci(encoded.mean, factors)
    likelihood = yaml.safe_load((folder / "config.yaml").read_text())["loss"]["reconstruction"]
    held = bounds(model, Images(data.images[:200]), likelihood)
    return {
        "mig": mutual_information_gap(encoded.mean, factors),
        **dict(zip(COLUMNS[1:4], scores, strict=False)),
        "active_units": information(encoded)["active_units"],
        **{name: held[name] for name in ("rate", "distortion")},
    }


def _report(found: dict[float, list[dict[str, float]]], output: Path) -> None:
    """Print and write the table, mean and standard deviation over seeds, and draw rate against distortion."""
    lines = [f"| beta | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for beta, runs in sorted(found.items()):
        cells = [_cell([run[name] for run in runs]) for name in COLUMNS]
        lines.append(f"| {beta:g} | {len(runs)} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    with replacing(output / "table.md") as path:
        path.write_text(table)
    points = [
        plots.RatePoint(*(mean(run[name] for run in runs) for name in ("rate", "distortion")), beta)
        for beta, runs in found.items()
    ]
    style.save(plots.rate_distortion(points), output / "rate_distortion.png")
    print(table, flush=True)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
