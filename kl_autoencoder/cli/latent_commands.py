"""What interpolate, sample, attribute and anomaly do, with arguments that checks.py has seen."""

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import image_grid, image_size, load_image, open_image, pad_to_multiple, save_image
from ..data.sources import Keys, encoded_file, open_source
from ..evaluation.anomaly import SCORES, Detector, roc
from ..files import replacing
from ..latents import interpolation
from ..models.autoencoder_kl import KLAutoencoder
from ..networks.distributions import DiagonalGaussian
from ..progress import tracked
from .loading import load_model
from .main import say

FALSE_ALARMS = 0.05


def interpolate(arguments: argparse.Namespace) -> None:
    """Two photographs -> a strip of decoded latents between theirs."""
    a, b = arguments.a, arguments.b
    size = (arguments.size,) * 2 if arguments.size else image_size(a)
    vae = load_model(arguments.model, arguments.device, "float32")
    ends = [_posterior(vae, load_image(path, size, multiple_of=1)).mode()[0] for path in (a, b)]
    latents = interpolation.interpolate(*ends, arguments.steps, arguments.spherical)
    labels = [f"{i / (len(latents) - 1):.2f}" for i in range(len(latents))]
    _save_strip(_decoded(vae, latents, size), labels, arguments.output)


def sample(arguments: argparse.Namespace) -> None:
    """Decoded draws from the prior, or from a Gaussian that is fitted to photographs."""
    output, fit = arguments.output, arguments.fit
    vae = load_model(arguments.model, arguments.device, "float32")
    size = _size(arguments, vae)
    side = size // vae.downsampling
    gaussian = interpolation.standard_normal(vae.config.latent_channels, side, side)
    if fit:
        gaussian = interpolation.fitted(_posteriors(vae, arguments.data, "--data", size), fit)
    generator = torch.Generator().manual_seed(arguments.seed)
    latents = torch.cat([gaussian.sample(generator) for _ in range(arguments.grid**2)])
    image_columns = _decoded(vae, latents, (size, size)).chunk(arguments.grid)
    _save_picture(image_grid(image_columns), output)


def attribute(arguments: argparse.Namespace) -> None:
    """A photograph with an attribute, what two sets of photographs differ by, added in one strength or several."""
    photo, output = arguments.photograph, arguments.output
    vae = load_model(arguments.model, arguments.device, "float32")
    size = _size(arguments, vae)
    sets = {"--plus": arguments.plus, "--minus": arguments.minus}
    plus, minus = (interpolation.mean_latent(_posteriors(vae, name, key, size)) for key, name in sets.items())
    latent = _posterior(vae, load_image(photo, size, multiple_of=1)).mode()
    latents = torch.cat([latent + strength * (plus - minus).to(latent) for strength in arguments.strength])
    _save_strip(_decoded(vae, latents, (size, size)), [f"{s:+g}" for s in arguments.strength], output)


def anomaly(arguments: argparse.Namespace) -> None:
    """Scores of photographs by how unlike the reference they are to the model; with labels, what finds them."""
    output, labels = arguments.output, arguments.labels
    vae = load_model(arguments.model, arguments.device, "float32")
    size, f = _size(arguments, vae), vae.downsampling
    reference, data = _open(arguments.reference, "--reference"), _open(arguments.data, "--data")
    halves = (
        [
            images
            for _, images in _read(reference, range(half, len(reference), 2), size, "reading the reference")
        ]
        for half in (0, 1)
    )
    detector = Detector(vae, *halves)
    names, scores = [], []
    for name, images in _read(data, range(len(data)), size, "scoring"):
        names.append(os.path.relpath(name, arguments.data) if os.path.isdir(arguments.data) else name)
        scores.append(detector.scores(images))
    if labels is not None and (unknown := [name for name in names if name not in labels]):
        raise ValueError(f"{arguments.labels_file}: no label of {unknown[0]}")
    p_values = [{f"p_{name}": detector.p_value(name, score[name]) for name in SCORES} for score in scores]
    rows = [{"name": n, **s, **p} for n, s, p in zip(names, scores, p_values, strict=True)]
    _write_csv(output, rows)
    print(
        f"{output}: {len(rows)} photographs against {len(reference)} of the reference, {size}x{size}, f = {f}"
    )
    if labels is None:
        for name in SCORES:
            strange = sum(row[f"p_{name}"] <= FALSE_ALARMS for row in rows)
            print(f"{name:8}{strange} stranger than {1 - FALSE_ALARMS:.0%} of the reference")
        return
    points = []
    for name in SCORES:
        fpr, tpr, area = roc([row[name] for row in rows], [labels[name] for name in names])
        points += [{"score": name, "fpr": x, "tpr": y} for x, y in zip(fpr, tpr, strict=True)]
        found = tpr[fpr <= FALSE_ALARMS].max()
        print(f"{name:8}ROC AUC {area:.3f}, {found:.0%} found at {FALSE_ALARMS:.0%} false alarms")
    _write_csv(arguments.curves, points)


def _size(arguments: argparse.Namespace, vae: KLAutoencoder) -> int:
    size = arguments.size or vae.config.sample_size
    if size % vae.downsampling:
        raise ValueError(f"--size: {size}; allowed: multiples of {vae.downsampling}")
    return size


def _open(source: str, key: str) -> datasets.Dataset:
    return open_source(source, Keys(key, key), in_order=True)


def _read(
    photographs: datasets.Dataset, rows: Sequence[int], size: int, what: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, images (1, 3, size, size)) of the centre squares; one that cannot be read is told and left out."""
    for row in tracked(rows, what, "images"):
        record = photographs[row]["image"]
        name = (record or {}).get("path") or f"row {row}"
        try:
            yield name, load_image(open_image(encoded_file(record, name)), size)
        except (ValueError, OSError) as error:
            say("skipped", error)


def _posterior(vae: KLAutoencoder, images: Tensor) -> DiagonalGaussian:
    with torch.inference_mode():
        return vae.encode(pad_to_multiple(images, vae.downsampling).to(vae.device)).latent_dist


def _posteriors(vae: KLAutoencoder, source: str, key: str, size: int) -> Iterator[DiagonalGaussian]:
    photographs = _open(source, key)
    rows = range(len(photographs))
    return (
        _posterior(vae, images) for _, images in _read(photographs, rows, size, f"encoding {key.strip('-')}")
    )


def _decoded(vae: KLAutoencoder, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """One at a time, so that what is beside it changes nothing of an image."""
    with torch.inference_mode():
        singly = tracked(latents.split(1), "decoding", "images")
        images = [vae.decode(z.to(vae.device)).sample.cpu() for z in singly]
    return torch.cat(images)[:, :, : size[0], : size[1]]


def _save_strip(images: Tensor, labels: Sequence[str], output: Path) -> None:
    _save_picture(image_grid(images.split(1), labels), output)


def _save_picture(picture: Image.Image, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, output)
    print(output)


def _write_csv(path: Path, rows: Sequence[dict]) -> None:
    if not rows:
        raise ValueError(f"{path}: nothing to write, no photograph could be read")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
