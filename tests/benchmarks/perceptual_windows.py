"""How much an autoencoder has adapted to the grid and the scale of a network of LPIPS that it was trained with.

    python -m tests.benchmarks.perceptual_windows FOLDER MODEL... > table.md

Images and their reconstructions are compared in windows that begin at row and column 0, 1, 2 ..., and enlarged
or shrunk (bicubic). An image looks nearly the same in all of these; to a model that was trained with LPIPS of
whole crops it makes a difference (`train/autoencoder/windows.py`).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.data.image_io import load_image
from kl_autoencoder.evaluation.metrics import LPIPS

SHIFTS = (0, 1, 2, 3, 4, 5)
SCALES = (0.5, 0.75, 1.5, 2.0)
NETS = ("squeeze", "alex")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    columns = [*(f"from {shift}" for shift in SHIFTS), *(f"x {scale}" for scale in SCALES)]
    print("| model | LPIPS |", " | ".join(columns), "|\n|---|---|" + "---|" * len(columns))
    lpips = {net: LPIPS(net) for net in NETS}
    images = [load_image(path) for path in sorted(options.folder.iterdir())]
    for name in options.models:
        model = KLAutoencoder.from_pretrained(name)
        pairs = [torch.cat([image, model(image).sample.clamp(-1, 1)]) for image in images]
        for net in NETS:
            means = [mean(lpips[net], [shifted(pair, shift) for pair in pairs]) for shift in SHIFTS]
            means += [mean(lpips[net], [resized(pair, scale) for pair in pairs]) for scale in SCALES]
            print(f"| {name} | {net} |", " | ".join(f"{value:.3f}" for value in means), "|", flush=True)


def mean(lpips: LPIPS, pairs: list[Tensor]) -> float:
    """Mean LPIPS of pairs, (2, C, H, W) each."""
    return sum(lpips(pair[1:], pair[:1]).item() for pair in pairs) / len(pairs)


def shifted(pair: Tensor, shift: int) -> Tensor:
    """The window from row and column `shift` on; windows of all shifts have one size."""
    height, width = (side - max(SHIFTS) for side in pair.shape[2:])
    return pair[..., shift : shift + height, shift : shift + width]


def resized(pair: Tensor, scale: float) -> Tensor:
    return F.interpolate(pair, scale_factor=scale, mode="bicubic", antialias=True)


if __name__ == "__main__":
    main()
