"""What `diffusability.py` writes: the table, the curves, and pictures of each objective."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

from kl_autoencoder.data.image_io import image_grid
from kl_autoencoder.evaluation.pictures.style import CLASSES, axes, save, titled
from kl_autoencoder.files import replacing

BASELINE = "plain"
SHOWN = 10  # pictures of an objective

Runs = list[dict]  # an entry a seed


def report(found: dict[str, Runs], output: Path, pictures: Sequence[Tensor]) -> None:
    """Write table.md, curves.png and pictures.jpg.

    found: of each objective its runs, in the order of the seeds. pictures: of each, (N, 3, H, W) in [-1, 1].
    """
    table = as_table(found)
    with replacing(output / "table.md") as path:
        path.write_text(table)
    save(curves(found), output / "curves.png")
    rows = torch.stack([of_objective[:SHOWN] for of_objective in pictures])
    sheet = image_grid(rows.unbind(1))
    with replacing(output / "pictures.jpg") as path:
        sheet.save(path, "JPEG", quality=85)
    print(table, flush=True)


def as_table(found: dict[str, Runs]) -> str:
    """A row an objective: means and deviations over the seeds."""
    steps = list(next(iter(found.values()))[0]["frechet"])[1:]
    heads = ["objective", "seeds", "PSNR, LPIPS", "coded", "loss", "denoised: rms", "LPIPS",
             *(f"Frechet, {step} steps" for step in steps), "speed-up"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in found.items():
        last = max(runs[0]["loss"], key=int)
        cells = [
            name,
            str(len(runs)),
            f"{runs[0]['psnr']:.2f} dB, {runs[0]['lpips']:.3f}",
            f"{runs[0]['frechet_coded']:.0f}",
            spread([run["loss"][last] for run in runs], ".4f"),
            spread([run["denoised"]["rms"] for run in runs], ".1f"),
            spread([run["denoised"]["lpips"] for run in runs], ".3f"),
            *(spread([run["frechet"][step] for run in runs], ".0f") for step in steps),
            speed_up(runs, found.get(BASELINE, [])),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def speed_up(runs: Runs, baseline: Runs) -> str:
    """How many times fewer steps than BASELINE's, of the same seed, lead to its last distance."""
    ratios = []
    for run, other in zip(runs, baseline, strict=False):
        last = list(other["frechet"])[-1]
        needed = steps_to(run["frechet"], other["frechet"][last])
        if needed is None:
            return "not reached"
        ratios.append(int(last) / needed)
    return spread(ratios, ".2f") if ratios else ""


def steps_to(distances: dict[str, float], wanted: float) -> float | None:
    """The step at which a line through the distances first falls to `wanted`; None if it does not."""
    for (step, distance), (next_step, next_distance) in pairwise(distances.items()):
        if next_distance <= wanted:
            share = (distance - wanted) / (distance - next_distance)
            return int(step) + share * (int(next_step) - int(step))
    return None


def curves(found: dict[str, Runs]):
    """The distance over the steps, mean and deviation over the seeds."""
    figure, ax = axes(6.4, 4.2)
    for colour, (name, runs) in zip(CLASSES, found.items(), strict=False):
        values = np.array([list(run["frechet"].values())[1:] for run in runs])
        steps = [int(step) for step in runs[0]["frechet"]][1:]
        deviations = values.std(0, ddof=min(1, len(runs) - 1))
        ax.errorbar(steps, values.mean(0), deviations, color=colour, label=name, capsize=3)
    titled(ax, "Decoded samples", "steps of the diffusion model", "Frechet distance, SqueezeNet's features")
    ax.legend(frameon=False)
    return figure
