"""The picture of the README: six held-out photographs and what a model makes of them.

    python -m tests.benchmarks.compact_picture FOLDER -o tests/benchmarks/results/compact.jpg [--model MODEL]

FOLDER holds photographs of 512x512; `SHOWN` are their places in the order of names.
"""

import argparse
from pathlib import Path

import torch

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.data.image_io import image_grid, load_image

SHOWN = (2, 13, 3, 17, 8, 18)  # by row
LABELS = ["original", "reconstruction"] * 2


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="compact")
    options = parser.parse_args()
    files = sorted(options.folder.iterdir())
    originals = torch.cat([load_image(files[number]) for number in SHOWN])
    model = KLAutoencoder.from_pretrained(options.model)
    found = torch.cat([model(image[None]).sample for image in originals])
    left, right = slice(0, None, 2), slice(1, None, 2)
    grid = image_grid([originals[left], found[left], originals[right], found[right]], LABELS)
    grid.save(options.output, quality=80)


if __name__ == "__main__":
    main()
