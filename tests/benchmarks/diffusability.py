"""Which objective of an autoencoder makes latents that a diffusion model learns in fewer steps?

    python -m tests.benchmarks.diffusability FOLDER -o runs/diffusability --seeds 0 1 2

One autoencoder is fine-tuned once for each of OBJECTIVES; its latents, each channel of mean 0 and deviation 1,
train the same diffusion transformer with each seed. FOLDER holds parquet files of photographs with a column
`source`. What is there already is not made again: the same command goes on where it was stopped, in the middle of a
run too. table.md, curves.png and pictures.jpg are written after every run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor

from kl_autoencoder.data.image_io import load_image, tensor_to_images
from kl_autoencoder.evaluation.frechet import Features, FeatureSums, frechet_distance, squeezenet
from kl_autoencoder.evaluation.metrics import LPIPS
from kl_autoencoder.files import replacing
from kl_autoencoder.models.run_folder import read_metrics

from .diffusability_report import report

SIZE = 96
HELD_OUT = 64  # photographs
TIMES = (0.2, 0.4, 0.6, 0.8)  # from latents, 0, to noise, 1
PICTURES = 256  # whose features are compared with those of all photographs
GAP = 4  # pixels between the pictures of a grid, as `image_grid` leaves them
SETS = {"train": "train", "validation": "held_out"}  # key of data -> its file

OBJECTIVES = {  # the loss of the fine-tuning, beside FINE_TUNING's
    "plain": {"kl": {"weight": 1e-6}},
    "kl": {"kl": {"weight": 2e-2}},
    "noise": {"kl": {"weight": 1e-6}, "view": {"kind": "noise", "high": 3.0}},
    "kl_noise": {"kl": {"weight": 2e-2}, "view": {"kind": "noise", "high": 1.0}},
    "kl_noise_2": {"kl": {"weight": 2e-2}, "view": {"kind": "noise", "high": 2.0}},
    "equivariance": {"kl": {"weight": 1e-6}, "view": {"kind": "equivariance"}},
}
FINE_TUNING = f"""
data: {{validation_resolution: 256, resolution: {SIZE}, crop_scale: [0.1, 1], batch_size: 8, num_workers: 0}}
loss: {{reconstruction: l1, perceptual: {{weight: 0.8, net: squeeze}}}}
optimizer: {{learning_rate: 2.0e-4, warmup_steps: 50, schedule: linear}}
ema: {{decay: 0.98}}
train: {{steps: 600, mixed_precision: bf16}}
validation: {{every: 0}}
log: {{every: 20, tensorboard: false}}
checkpoint: {{every: 100}}
"""
DIFFUSION = f"""
task: latent_diffusion
data: {{batch_size: 64}}
model: {{patch_size: 2, hidden_size: 128, layers: 6, heads: 2}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 100, gradient_clip: 1.0}}
ema: {{decay: 0.99}}
train: {{steps: 800}}
validation: {{every: 200, pictures: {PICTURES}, inference_steps: 20}}
log: {{every: 25, tensorboard: false}}
checkpoint: {{every: 100, keep_last: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "photographs", type=Path, help="a folder of parquet files with the columns image, source"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--sources", nargs="+", default=["caltech101", "clothing"], help="of `source`, to keep"
    )
    parser.add_argument("--model", default="compact", help="that is fine-tuned")
    parser.add_argument(
        "--features", help="a vision transformer, such as DINOv2: adds the objective alignment"
    )
    parser.add_argument(
        "--objectives", nargs="+", help=f"of {', '.join(OBJECTIVES)}, alignment (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the diffusion model's run"
    )
    parser.add_argument(
        "--set-autoencoder", nargs="+", default=[], metavar="KEY=VALUE", help="of the fine-tuning"
    )
    arguments = parser.parse_args()
    objectives = dict(OBJECTIVES)
    if arguments.features:
        alignment = {"kind": "alignment", "model": arguments.features}
        objectives["alignment"] = {"kl": {"weight": 1e-6}, "terms": [alignment]}
    chosen = arguments.objectives or list(objectives)
    output = arguments.output
    split(arguments.photographs, arguments.sources, output)
    found: dict[str, list[dict]] = {}
    for seed in arguments.seeds:
        for name in chosen:
            tuned = fine_tuned(output, name, objectives[name], arguments.model, arguments.set_autoencoder)
            figures = diffused(output, name, seed, arguments.set)
            found.setdefault(name, []).append(tuned | figures)
            report(found, output, [last_pictures(output, done, arguments.seeds[0]) for done in found])


def split(folder: Path, sources: list[str], output: Path) -> None:
    """Write train.parquet and held_out.parquet, HELD_OUT photographs spread evenly over all, and their centre crops
    of SIZE pixels, small-train.parquet and small-held_out.parquet."""
    if (output / "small-train.parquet").is_file():
        return
    output.mkdir(parents=True, exist_ok=True)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])
    table = table.filter(pc.is_in(table["source"], pa.array(sources)))
    if len(table) < 2 * HELD_OUT:
        sys.exit(
            f"{folder}: {len(table)} photographs of {', '.join(sources)}; allowed: at least {2 * HELD_OUT}"
        )
    held_out = range(0, len(table), len(table) // HELD_OUT)[:HELD_OUT]
    kept = sorted(set(range(len(table))) - set(held_out))
    for name, rows in (("held_out", held_out), ("train", kept)):
        part = table.take(list(rows))
        with replacing(output / f"{name}.parquet") as path:
            pq.write_table(part, path)
        cells = [{"bytes": shrunk(cell["bytes"]), "path": cell["path"]} for cell in part["image"].to_pylist()]
        with replacing(output / f"small-{name}.parquet") as path:
            pq.write_table(pa.table({"image": cells}), path)


def shrunk(encoded: bytes) -> bytes:
    """A photograph's centre crop of SIZE pixels as PNG."""
    [image] = tensor_to_images(load_image(Image.open(BytesIO(encoded)), SIZE))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def fine_tuned(output: Path, name: str, loss: dict, model: str, overrides: list[str]) -> dict[str, float]:
    """Fine-tune `model` with this loss and encode the photographs; returns PSNR and LPIPS of held-out ones."""
    run, latents = output / name / "autoencoder", output / name / "latents"
    recipe = yaml.safe_load(FINE_TUNING)
    recipe["model"] = {"pretrained": model}
    recipe["loss"] |= loss
    recipe["data"] |= {part: str(output / f"{file}.parquet") for part, file in SETS.items()}
    train(recipe, run, overrides)
    for part in SETS.values():
        if not (latents / part / "manifest.json").is_file():
            command = [
                "encode-dataset",
                "--model",
                f"{run}/export",
                "--data",
                f"{output}/small-{part}.parquet",
            ]
            mirrored = ["--flip"] if part == "train" else []
            python(
                "-m", "kl_autoencoder", *command, "--size", str(SIZE), *mirrored, "-o", f"{latents}/{part}"
            )
    last = [line for line in read_metrics(run / "metrics.jsonl") if "validation/psnr" in line][-1]
    return {key: last[f"validation/{key}"] for key in ("psnr", "lpips")}


def diffused(output: Path, name: str, seed: int, overrides: list[str]) -> dict:
    """Train the transformer on the latents of an objective and measure it, unless that is done."""
    run = output / name / f"seed{seed}"
    kept = run / "measures.json"
    if not kept.is_file():
        recipe = yaml.safe_load(DIFFUSION) | {"seed": seed}
        recipe["data"] |= {part: f"{output}/{name}/latents/{file}" for part, file in SETS.items()}
        train(recipe, run, overrides)
        with replacing(kept) as path:
            path.write_text(json.dumps(measures(run, output), indent=1) + "\n")
    return json.loads(kept.read_text())


def train(recipe: dict, run: Path, overrides: list[str]) -> None:
    """Train, or go on, unless the run has exported its last step."""
    if (run / "export").is_dir():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    config = run.parent / f"{run.name}.yaml"
    config.write_text(yaml.safe_dump(recipe | {"output_dir": str(run)}))
    python("-m", "train", str(config), *overrides)


def python(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


@torch.inference_mode()
def measures(run: Path, output: Path) -> dict:
    """Loss and Frechet distance of the pictures of each validation, and errors of denoised latents at the end."""
    features, train, real = training_photographs(output)
    pipe = DiTPipeline.from_pretrained(run / "export")
    losses = {line["step"]: line["validation/loss"] for line in read_metrics(run / "metrics.jsonl")
              if "validation/loss" in line}  # fmt: skip
    distances = {
        int(path.stem.removeprefix("step-")): frechet_distance(sums(features, cut(path).split(1)), real)
        for path in sorted((run / "samples").glob("step-*.png"))
    }
    coded = [pipe.vae(image).sample.clamp(-1, 1) for image in train[:: len(train) // PICTURES][:PICTURES]]
    held_out = torch.cat(list(photographs(output / "small-held_out.parquet")))
    return {
        "loss": losses,
        "frechet": distances,
        "frechet_coded": frechet_distance(sums(features, coded), real),
        "denoised": denoised(pipe, held_out),
    }


@cache
def training_photographs(output: Path) -> tuple[Features, list[Tensor], FeatureSums]:
    """SqueezeNet, the photographs that every objective is compared with, and their features."""
    features, images = squeezenet(torch.device("cpu")), list(photographs(output / "small-train.parquet"))
    return features, images, sums(features, images)


def sums(features: Features, images: Iterable[Tensor]) -> FeatureSums:
    found = FeatureSums()
    for image in images:
        found.update(features(image))
    return found


def photographs(path: Path) -> Iterator[Tensor]:
    """Images (1, 3, SIZE, SIZE) in [-1, 1]."""
    for cell in pq.read_table(path)["image"].to_pylist():
        yield load_image(Image.open(BytesIO(cell["bytes"])))


def cut(path: Path) -> Tensor:
    """A grid of pictures -> (N, 3, SIZE, SIZE) in [-1, 1]."""
    grid = load_image(Image.open(path))
    rows = [grid[..., y : y + SIZE, :] for y in range(0, grid.shape[2], SIZE + GAP)]
    return torch.cat([row[..., x : x + SIZE] for row in rows for x in range(0, grid.shape[3], SIZE + GAP)])


def last_pictures(output: Path, name: str, seed: int) -> Tensor:
    """What the last transformer of an objective made, (N, 3, SIZE, SIZE)."""
    return cut(sorted((output / name / f"seed{seed}" / "samples").glob("step-*.png"))[-1])


def denoised(pipe: DiTPipeline, images: Tensor) -> dict[str, float]:
    """Images decoded from latents that the network has denoised in one step: error against the images.

    From x_t = (1 - t) z + t e the network's v gives z = x_t - t v. The mean over TIMES of the root mean square
    error, in levels of 255, and of LPIPS (alex).
    """
    lpips, errors = LPIPS("alex"), []
    z = pipe.vae.encode(images).latent_dist.mode()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(len(z), dtype=torch.int64)
    for t in TIMES:
        x = (1 - t) * z + t * noise
        v = pipe.transformer(x, timestep=torch.full((len(z),), 1000 * t), class_labels=labels).sample
        made = pipe.vae.decode(x - t * v).sample.clamp(-1, 1)
        errors.append(
            (float((made - images).square().mean().sqrt()) * 127.5, float(lpips(made, images).mean()))
        )
    rms, perceptual = (sum(values) / len(TIMES) for values in zip(*errors, strict=True))
    return {"rms": rms, "lpips": perceptual}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
