"""Does an attribute learned from a column of sample-shapes move its property, and only that one?

    python -m train configs/family/beta_vae_shapes.yaml
    python -m tests.benchmarks.attribute_shapes runs/family/beta_vae_shapes

The direction of hue, scale, x and y is the mean latent of the images in the upper half of the column less that of
the lower half, as `kl-autoencoder attribute --column` takes it. Held-out images are moved along it, -1 to 1 times,
and decoded. Each property is measured on the pictures: the place of the brightness's centre, the root of its sum,
the hue of its mean colour, and divided by its range (5 to 95 %) over the reconstructions of the data. Printed is
how far each property moves from one end to the other, averaged over the images, and whether that mean is monotone.
"""

import argparse
import colorsys
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kl_autoencoder.cli.labelled_images import KEYS
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.data.image_io import load_image, open_image
from kl_autoencoder.data.sources import column_values, encoded_file, open_source
from kl_autoencoder.latents.attributes import rows_of_kinds

PROPERTIES = ("hue", "scale", "x", "y")
LEARNED_FROM, MOVED = 4000, 200
STRENGTHS = np.linspace(-1, 1, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, help="a .json file for the figures")
    arguments = parser.parse_args()
    model = load_model(arguments.model, "cpu", "float32")
    found = {"strengths": [STRENGTHS[0], STRENGTHS[-1]], **moves(model)}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"| direction | {' | '.join(PROPERTIES)} | monotone | largest other |")
    print("|---" * (len(PROPERTIES) + 3) + "|")
    for name in PROPERTIES:
        cells = " | ".join(f"{found[name]['moved'][other]:+.2f}" for other in PROPERTIES)
        print(f"| {name} | {cells} | {found[name]['monotone']} | {found[name]['largest_other']:.0%} |")


@torch.no_grad()
def moves(model) -> dict:
    """Property -> how far it and the others move along its direction, in their ranges."""
    rows, latents = encoded(model, "train", LEARNED_FROM)
    _, starts = encoded(model, "validation", MOVED)
    measured = properties(decoded(model, latents[:1000]))
    ranges = np.diff(np.percentile(measured, [5, 95], axis=0), axis=0)[0]
    found = {}
    for place, name in enumerate(PROPERTIES):
        plus, minus = rows_of_kinds(column_values(rows, name)[:LEARNED_FROM], LEARNED_FROM)
        direction = latents[plus].mean(0) - latents[minus].mean(0)
        steps = [properties(decoded(model, starts + float(s) * direction)).mean(0) for s in STRENGTHS]
        change = np.diff(np.stack(steps) / ranges, axis=0)  # (strengths - 1, properties)
        moved, far = change.sum(0), np.abs(np.cumsum(change, axis=0)).max(0)
        found[name] = {
            "moved": dict(zip(PROPERTIES, moved.tolist(), strict=True)),
            "monotone": bool((change[:, place] > 0).all()),
            "largest_other": float(np.delete(far, place).max() / abs(moved[place])),
        }
    return found


def encoded(model, split: str, count: int) -> tuple:
    """The rows of a split, and the means of the posteriors of the first `count`."""
    rows = open_source("sample-shapes", KEYS, samples=split, keep=PROPERTIES, in_order=True)
    size, latents = model.config.sample_size, []
    for start in range(0, count, 200):
        files = [encoded_file(rows[n]["image"], str(n)) for n in range(start, min(count, start + 200))]
        images = torch.cat([load_image(open_image(file), size) for file in files])
        latents.append(model.encode(images).latent_dist.mode())
    return rows, torch.cat(latents)


def decoded(model, latents: Tensor) -> Tensor:
    return torch.cat([model.decode(part).sample for part in latents.split(200)])


def properties(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, 4): hue of the mean colour, root of the area in pixels, centre x and y."""
    colours = ((images.double() + 1) / 2).clamp(0, 1)
    bright = colours.amax(1)  # shapes have full brightness
    area = bright.sum((1, 2))
    x = (bright.sum(1) * torch.arange(bright.shape[2])).sum(1) / area
    y = (bright.sum(2) * torch.arange(bright.shape[1])).sum(1) / area
    mean = colours.sum((2, 3)) / area[:, None]
    hue = [colorsys.rgb_to_hsv(*colour)[0] for colour in mean.tolist()]
    return np.stack([hue, area.sqrt(), x, y], axis=1)


if __name__ == "__main__":
    main()
