"""Two pictures of the family's page: rate and distortion of digits over beta, and what lies between two faces.

    python -m tests.benchmarks.family_pictures -o runs/family_pictures

Trains vae_digits once a beta, and ae_faces, unless that was done; writes rate_distortion.jpg and .md, and
faces.jpg.
"""

import argparse
import json
import os
from pathlib import Path

from PIL import Image

from kl_autoencoder.cli.labelled_images import binarised, read_labelled
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.data.samples.installed import face_patches
from kl_autoencoder.evaluation.pictures import plots, style
from kl_autoencoder.evaluation.variational.measures import Images, bounds, encode, information
from kl_autoencoder.files import replacing
from tests.benchmarks.family import ROOT, python

HELD_OUT_PAIRS = ((80, 93), (85, 97))  # faces that ae_faces does not train on
ENLARGED = 3
FIGURES = ("rate", "distortion", "elbo", "active_units")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.125, 0.5, 1, 4])
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    found = {beta: of_beta(output, beta) for beta in arguments.betas}
    lines = [f"| beta | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 1) + "|"]
    for beta, figures in found.items():
        lines.append(f"| {beta:g} | {' | '.join(f'{figures[name]:.3g}' for name in FIGURES)} |")
    (output / "rate_distortion.md").write_text("\n".join(lines) + "\n")
    points = [plots.RatePoint(values["rate"], values["distortion"], beta) for beta, values in found.items()]
    style.save(plots.rate_distortion(points), output / "rate_distortion.png")
    as_jpeg(Image.open(output / "rate_distortion.png"), output / "rate_distortion.jpg")
    faces_between(output)


def of_beta(output: Path, beta: float) -> dict[str, float]:
    """Rate, distortion, their bound and the active units of the held-out digits, trained with a beta."""
    run, kept = output / f"beta{beta:g}", output / f"beta{beta:g}.json"
    if not kept.is_file():
        train("vae_digits", run, f"loss.kl.weight={beta:g}")
        model = load_model(str(run), "cpu", "float32").requires_grad_(False)
        digits = read_labelled("sample-digits", 8, 1, 1000, "image", None, "validation")
        data = Images(binarised(digits.images, "dynamic", seed=0))
        figures = bounds(model, data, "bernoulli") | information(encode(model, data))
        with replacing(kept) as path:
            path.write_text(json.dumps({name: figures[name] for name in FIGURES}) + "\n")
    return json.loads(kept.read_text())


def faces_between(output: Path) -> None:
    """A strip for each pair of held-out faces, from one to the other through the latents of ae_faces."""
    run, strips = output / "ae_faces", []
    train("ae_faces", run)
    for number, pair in enumerate(HELD_OUT_PAIRS):
        faces = [output / f"face{face}.png" for face in pair]
        for face, path in zip(pair, faces, strict=True):
            Image.fromarray(face_patches()[face]).save(path)
        strip = output / f"strip{number}.png"
        python("-m", "kl_autoencoder", "interpolate", *map(str, faces), "--model", str(run), "-o", str(strip),
               "--overwrite")  # fmt: skip
        strips.append(Image.open(strip).convert("L"))
    width, height = strips[0].size
    picture = Image.new("L", (width, sum(strip.height for strip in strips)), 255)
    for number, strip in enumerate(strips):
        picture.paste(strip, (0, number * height))
    as_jpeg(picture.resize((ENLARGED * picture.width, ENLARGED * picture.height)), output / "faces.jpg")


def train(recipe: str, run: Path, *keys: str) -> None:
    if not (run / "export").is_dir():
        python("-m", "train", str(ROOT / "configs" / "family" / f"{recipe}.yaml"), f"output_dir={run}", *keys)


def as_jpeg(picture: Image.Image, path: Path) -> None:
    picture.convert("RGB").save(path, quality=85)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
