"""anomaly: score photographs by how unlike ordinary ones they are to a model."""

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.locating import locate
from ...files import replacing
from ..parser import IMAGES, MODEL, Command, Parser, add_device, add_output
from ..paths import check_model, refuse_existing
from .latent_space import add_size, open_photographs, read_squares, size_of_squares

if TYPE_CHECKING:
    import datasets

    from ...evaluation.anomaly import Detector
    from ...models.autoencoder_kl import KLAutoencoder

FALSE_ALARMS = 0.05  # false positive rate at which the true positive rate is printed


def anomaly_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--reference", required=True, metavar="SOURCE", help="ordinary photographs")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="photographs to score")
    parser.add_argument("--labels", metavar="FILE.csv", help="lines of name,0 (ordinary) or name,1 (strange)")
    add_size(parser, "crop all to squares of N x N (what the model is made for)")
    add_device(parser)
    add_output(parser, "SCORES.csv", "with labels, SCORES.roc.csv too")


def check_anomaly(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path, `labels` a dict name -> label; adds `labels_file`, and `curves`, the ROC's path."""
    arguments.output = Path(arguments.output)
    arguments.curves = arguments.output.with_suffix(".roc.csv")
    if arguments.output.suffix != ".csv":
        raise ValueError(f"{arguments.output}: scores are written to a .csv file")
    refuse_existing([arguments.output, arguments.curves], [arguments.labels or ""], arguments.overwrite)
    arguments.labels_file, arguments.labels = arguments.labels, _read_labels(arguments.labels)
    locate(arguments.reference, "--reference")
    locate(arguments.data, "--data")
    check_model(arguments.model)


def _read_labels(path: str | None) -> dict[str, int] | None:
    """Read lines of name,label with label 0 (ordinary) or 1 (strange)."""
    if path is None:
        return None
    labels = {}
    with open(path, newline="") as file:
        for row in csv.reader(file):
            if len(row) != 2 or row[1].strip() not in ("0", "1"):
                raise ValueError(f"{path}: {','.join(row)!r}; allowed: lines of name,0 or name,1")
            labels[row[0]] = int(row[1])
    return labels


def anomaly(arguments: argparse.Namespace) -> None:
    """Write the scores of photographs against a reference; with labels also their ROC curves."""
    from ...evaluation.anomaly import SCORES
    from ..loading import load_model

    output, labels = arguments.output, arguments.labels
    vae = load_model(arguments.model, arguments.device, "float32")
    size = size_of_squares(arguments.size, vae)
    reference = open_photographs(arguments.reference, "--reference")
    data = open_photographs(arguments.data, "--data")
    detector = _calibrated(vae, reference, size)
    rows = []
    for name, images in read_squares(data, range(len(data)), size, "scoring", vae.config.in_channels):
        name = os.path.relpath(name, arguments.data) if os.path.isdir(arguments.data) else name
        scores = detector.scores(images)
        p_values = {f"p_{score}": detector.p_value(score, scores[score]) for score in SCORES}
        rows.append({"name": name, **scores, **p_values})
    if labels is not None and (unknown := [row["name"] for row in rows if row["name"] not in labels]):
        raise ValueError(f"{arguments.labels_file}: no label of {unknown[0]}")
    _write_csv(output, rows)
    sizes = f"{size}x{size}, f = {vae.downsampling}"
    print(f"{output}: {len(rows)} photographs against {len(reference)} of the reference, {sizes}")
    if labels is None:
        for score in SCORES:
            strange = sum(row[f"p_{score}"] <= FALSE_ALARMS for row in rows)
            print(f"{score:8}{strange} stranger than {1 - FALSE_ALARMS:.0%} of the reference")
    else:
        _write_csv(arguments.curves, _curves(rows, labels))


def _calibrated(vae: "KLAutoencoder", reference: "datasets.Dataset", size: int) -> "Detector":
    """Calibrate a detector: its errors on one half of the reference, its scores on the other."""
    from ...evaluation.anomaly import Detector

    halves = [
        [
            images
            for _, images in read_squares(
                reference, rows, size, "reading the reference", vae.config.in_channels
            )
        ]
        for rows in (range(0, len(reference), 2), range(1, len(reference), 2))
    ]
    return Detector(vae, *halves)


def _curves(rows: Sequence[dict], labels: dict[str, int]) -> list[dict]:
    """The points of each score's ROC curve; prints the area under it and the rate at `FALSE_ALARMS`."""
    from ...evaluation.anomaly import SCORES, roc

    points = []
    for score in SCORES:
        fpr, tpr, area = roc([row[score] for row in rows], [labels[row["name"]] for row in rows])
        points += [{"score": score, "fpr": x, "tpr": y} for x, y in zip(fpr, tpr, strict=True)]
        found = tpr[fpr <= FALSE_ALARMS].max()
        print(f"{score:8}ROC AUC {area:.3f}, {found:.0%} found at {FALSE_ALARMS:.0%} false alarms")
    return points


def _write_csv(path: Path, rows: Sequence[dict]) -> None:
    if not rows:
        raise ValueError(f"{path}: nothing to write, no photograph could be read")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


COMMANDS = {
    "anomaly": Command(
        "score photographs by how strange they are to a model",
        anomaly_arguments,
        check_anomaly,
        anomaly,
        epilog=IMAGES,
    ),
}
