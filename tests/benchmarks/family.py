"""Train each recipe of configs/family with several seeds, measure it, and write the table and pictures of its page.

    python -m tests.benchmarks.family -o runs/family_page --seeds 0 1 2
    python -m tests.benchmarks.family -o runs/family_page --only vae_digits cvae_digits

What is there already is not trained or measured again: the same command goes on where it was stopped. family.json
(mean and deviation of each figure over the seeds) and table.md are written after every run, family.jpg at the end.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from PIL import Image
from sklearn.metrics import roc_auc_score

from kl_autoencoder.models.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {  # name -> the run that it needs first, and the data that it is studied on
    "ae_faces": (None, "sample-faces"),
    "vae_digits": (None, "sample-digits"),
    "vae_digits_2d": (None, "sample-digits"),
    "beta_vae_shapes": (None, "sample-shapes"),
    "cvae_digits": (None, "sample-digits"),
    "aae_digits": (None, "sample-digits"),
    "vqvae_digits": (None, "sample-digits"),
    "vqvae_digits_prior": ("vqvae_digits", None),
    "dvae_digits": (None, "sample-digits"),
    "fsq_photographs": (None, None),
    "vae_gan_photographs": (None, None),
}
SHOWN = {  # figure -> its heading, in the order of the table; a recipe has those that make sense of it
    "psnr": "PSNR", "lpips": "LPIPS", "elbo": "ELBO", "iwae_50": "IWAE-50", "rate": "rate",
    "distortion": "distortion", "active_units": "active", "mutual_information": "I(x; z)", "mmd": "MMD",
    "perplexity": "perplexity", "usage": "used", "nll": "nats a code", "roc_auc": "ROC AUC",
    "wall_seconds": "seconds",
}  # fmt: skip

PICTURE = (  # family.jpg: what is drawn of the first seed
    ("vae_digits_2d/study/manifold.png", "vae_digits_2d/study/latents.png", "aae_digits/study/latents.png"),
    ("beta_vae_shapes/study/traversals.png", "ae_faces/study/traversals.png", "vqvae_digits_prior/drawn.png"),
)
ROW_HEIGHT, GAP = 420, 16  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as train.steps=5")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name in arguments.only:
            folder = arguments.output / f"seed{seed}"
            found.setdefault(name, []).append(measured(name, folder, seed, arguments.set))
            report(found, arguments.output)
    assemble(arguments.output / f"seed{arguments.seeds[0]}", arguments.output / "family.jpg")


def measured(name: str, folder: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    """Train a recipe in `folder`/NAME and measure it, unless that was done."""
    kept = folder / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    run, (first, data) = folder / name, RECIPES[name]
    command = [
        "-m",
        "train",
        str(ROOT / "configs" / "family" / f"{name}.yaml"),
        f"output_dir={run}",
        f"seed={seed}",
    ]
    if first:
        command.append(f"model.autoencoder={folder / first}")
    started = time.perf_counter()
    python(*command, *overrides)
    figures = {"wall_seconds": time.perf_counter() - started, **of_the_run(run)}
    if data:
        options = [*study_options(name), "-o", f"{run}/study", "--overwrite"]
        python("-m", "kl_autoencoder", "study", str(run), "--data", data, *options)
        figures |= numbers(json.loads((run / "study" / "measures.json").read_text()))
    if name == "ae_faces":
        figures["roc_auc"] = strangers_found(run)
    if name == "vqvae_digits_prior":
        python("-m", "kl_autoencoder", "sample", str(folder / first), "--prior", str(run), "-o", f"{run}/drawn.png",
               "--overwrite")  # fmt: skip
    kept.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def study_options(name: str) -> list[str]:
    labelled = "digits" in name
    return ["--label-column", "label"] if labelled else []


def of_the_run(run: Path) -> dict[str, float]:
    """The figures of the held-out images at the end of a run."""
    last = [
        line for line in read_metrics(run / "metrics.jsonl") if any("validation/" in key for key in line)
    ][-1]
    return {key.removeprefix("validation/"): v for key, v in last.items() if key.startswith("validation/")}


def numbers(values: dict) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def strangers_found(run: Path) -> float:
    """ROC AUC of the reconstruction error that tells patches that are no faces from held-out faces."""
    scores = {}
    for data in ("sample-faces", "sample-strangers"):
        path = run / f"{data}.csv"
        python("-m", "kl_autoencoder", "anomaly", str(run), "--reference", "sample-faces", "--data", data, "-o",
               str(path), "--overwrite")  # fmt: skip
        with path.open() as file:
            scores[data] = [float(row["error"]) for row in csv.DictReader(file)]
    truth = [0] * len(scores["sample-faces"]) + [1] * len(scores["sample-strangers"])
    return float(roc_auc_score(truth, scores["sample-faces"] + scores["sample-strangers"]))


def python(*command: str) -> None:
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{finished.returncode}: {' '.join(command)}\n{finished.stderr[-2000:]}")


def report(found: dict[str, list[dict[str, float]]], output: Path) -> None:
    """family.json and table.md: mean and sample standard deviation over the seeds so far."""
    summary = {name: summarised(runs) for name, runs in found.items()}
    (output / "family.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = []
    for name, figures in summary.items():
        said = [f"{SHOWN[key]} {value}" for key, value in shown(figures)]
        lines.append(f"| [{name}]({name}.yaml) | {'; '.join(said)} |")
    (output / "table.md").write_text("\n".join(["| recipe | mean ± deviation |", "|---|---|", *lines]) + "\n")


def assemble(folder: Path, output: Path) -> None:
    """Lay the runs' pictures out in rows; those that are not there are left out."""
    there = [[folder / name for name in row if (folder / name).is_file()] for row in PICTURE]
    rows = [[of_row_height(Image.open(path)) for path in row] for row in there]
    width = max(sum(image.width + GAP for image in row) for row in rows)
    sheet = Image.new("RGB", (width, len(rows) * (ROW_HEIGHT + GAP)), "white")
    for number, row in enumerate(rows):
        x = 0
        for image in row:
            sheet.paste(image, (x, number * (ROW_HEIGHT + GAP)))
            x += image.width + GAP
    sheet.save(output, quality=85)


def of_row_height(image: Image.Image) -> Image.Image:
    """Digits of 8x8 are enlarged as they are, larger pictures shrunk smoothly."""
    how = Image.Resampling.NEAREST if image.height < ROW_HEIGHT else Image.Resampling.LANCZOS
    return image.resize((image.width * ROW_HEIGHT // image.height, ROW_HEIGHT), how)


def summarised(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    values = {key: [run[key] for run in runs] for key in keys}
    return {
        key: {"mean": mean(v), "deviation": stdev(v) if len(v) > 1 else 0.0, "runs": len(v)}
        for key, v in values.items()
    }


def shown(figures: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    return [
        (key, f"{figures[key]['mean']:.3g} ± {figures[key]['deviation']:.1g}")
        for key in SHOWN
        if key in figures
    ]


if __name__ == "__main__":
    main()
