"""Measure models and baselines on the same images, on any number of ranks: the content of metrics.json."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..data.image_dataset import Photograph, Photographs
from ..data.image_io import pad_to_multiple, save_image
from ..progress import Progress, tracked
from . import frechet, latent_probes
from .frechet import Features, FeatureSums
from .further_metrics import FURTHER_METRICS
from .latent_statistics import LatentSums, SpectrumSum
from .methods import Method, Model, Reproduction
from .metrics import LPIPS, MS_SSIM_TOO_SMALL, as_saved, ms_ssim, similarity

FORMAT = 1  # version of metrics.json, raised when a key is removed or changes its meaning
STUDY_SIZE = 256  # pixels a side of the images that are studied, if images are measured at their native sizes
IMAGE_METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "bits_per_pixel", "kl_bits_per_pixel", "not_finite")
SET_METRICS = ("rfid", "squeezenet_frechet_distance")


@dataclass
class MetricSuite:
    """The networks of the metrics, the same on every rank.

    Networks whose weights are not available are left out, and `notes` say why.
    """

    lpips: LPIPS | None
    features: dict[str, Features]  # keys are of `SET_METRICS`
    notes: list[str]
    further: dict[str, nn.Module]  # keys are of `FURTHER_METRICS`
    device: torch.device

    @classmethod
    def load(
        cls, lpips_net: str, device: torch.device, first: bool, further: Sequence[str] = ()
    ) -> "MetricSuite":
        """Load the networks on every rank; call it on all of them.

        lpips_net: vgg, alex or squeeze. first: whether this is rank 0, which downloads the files that the others
        then read. further: names of `FURTHER_METRICS`; as they were asked for by name, missing weights of theirs
        raise FileNotFoundError.
        """
        notes = []

        def load_or_note(load: Callable[[], Any], without: str):
            return _load_on_all_ranks(load, first, lambda error: notes.append(f"{without}: {error}"))

        with frechet.download_timeout():
            lpips = load_or_note(lambda: LPIPS(lpips_net).to(device), "no LPIPS")
        rfid = load_or_note(
            lambda: frechet.inception(device),
            "no rFID, but the same distance on SqueezeNet's features, under a name of its own",
        )
        features = {"rfid": rfid}
        if rfid is None:
            name = "squeezenet_frechet_distance"
            features = {
                name: load_or_note(lambda: frechet.squeezenet(device), "no distance on SqueezeNet's features")
            }
        asked_for = {
            name: _load_on_all_ranks(lambda made=FURTHER_METRICS[name]: made().to(device), first, _raise)
            for name in dict.fromkeys(further)
        }
        features = {name: network for name, network in features.items() if network}
        return cls(lpips, features, notes, asked_for, device)


def _raise(error: Exception) -> None:
    raise error


def _load_on_all_ranks(load: Callable[[], Any], first: bool, on_error: Callable[[Exception], None]) -> Any:
    """Call load() on rank 0, then on the others. If it raises OSError on rank 0, return on_error(error) on all."""
    found, error = None, None
    if first:
        try:
            found = load()
        except OSError as caught:
            error = caught
    error = distributed.gather([error])[0]
    if error is not None:
        return on_error(error)
    with distributed.failing_together():
        return found if first else load()


class Evaluation:
    """Measures methods on images: each rank its share, after `measure` every rank has the results of all."""

    def __init__(self, photographs: Photographs, methods: Sequence[Method], suite: MetricSuite):
        self.photographs, self.methods, self.suite = photographs, methods, suite
        self.rows = [row for method in methods for row in method.rows]
        # latents are the same in all rows of a model: statistics are taken in its first row and its first type
        models = [method for method in methods if isinstance(method, Model)]
        self.models = list({model.name: model for model in reversed(models)}.values())[::-1]
        self.latents_of_row = {model.rows[0].key: model.name for model in self.models}
        self.records: list[dict[str, Any]] = []
        self.latents = {model.name: LatentSums(model.vae.config.latent_channels) for model in self.models}
        self.spectrum = SpectrumSum()
        self.features = {(key, name): FeatureSums() for key in ("", *self._keys()) for name in suite.features}

    def _keys(self) -> list[str]:
        return [row.key for row in self.rows]

    # ---------------------------------------------------------------- image by image

    def measure(self, batch_size: int, save_to: Path | None = None) -> None:
        """Measure every image; `batch_size` images are reproduced at a time.

        save_to: a folder that gets the measured images as PNG. Raises ValueError if no image can be used.
        """
        place = distributed.join()
        batches = self.photographs.batches(batch_size, place.process_index, place.num_processes)
        mine = math.ceil(self.photographs.count / place.num_processes)
        with (
            distributed.failing_together(),
            Progress("measuring", mine, "images") as progress,
        ):
            for batch in batches:
                self._measure_batch(batch, save_to, progress)
        self._gather()
        if not self.records:
            reasons = "; ".join(list(self.photographs.skipped.values())[:3])
            raise ValueError(f"--data: no image of {self.photographs.source} can be used ({reasons})")

    def _measure_batch(self, batch: list[Photograph], save_to: Path | None, progress: Progress) -> None:
        images = torch.cat([photograph.image for photograph in batch])
        height, width = images.shape[2:]
        self._add_features("", images)
        for image in images:
            self.spectrum.update(image)
        values = [{} for _ in batch]
        for reproduction in self.reproductions(batch):
            key, rounded = reproduction.row.key, as_saved(reproduction.images)
            if reproduction.row.key in self.latents_of_row:
                self.latents[self.latents_of_row[key]].update(reproduction.posterior)
            self._add_features(key, rounded)
            measured = self._similarity(rounded, images) | reproduction.extras
            for i, of_image in enumerate(values):
                of_image[key] = {name: list_[i] for name, list_ in measured.items()}
            if save_to:
                _save(save_to / key, batch, rounded)
            progress.update(len(batch) / len(self.rows))
        if save_to:
            _save(save_to / "original", batch, images)
        for photograph, of_image in zip(batch, values, strict=True):
            about = {"number": photograph.number, "name": photograph.name, "height": height, "width": width}
            self.records.append({**about, "values": of_image})

    def reproductions(
        self, batch: list[Photograph], methods: Sequence[Method] | None = None
    ) -> Iterator[Reproduction]:
        """Yield a batch as reproduced by each row of `methods` (None: of all)."""
        images = torch.cat([photograph.image for photograph in batch])
        for method in self.methods if methods is None else methods:
            yield from method.reproduce(images, [photograph.number for photograph in batch])

    def _similarity(self, rounded: Tensor, images: Tensor) -> dict[str, list[float]]:
        measured = similarity(rounded, images, self.suite.lpips)
        if min(images.shape[2:]) > MS_SSIM_TOO_SMALL:
            measured["ms_ssim"] = ms_ssim(rounded, images).tolist()
        for name, metric in self.suite.further.items():
            if min(images.shape[2:]) >= metric.smallest:
                pair = (x.to(self.suite.device) for x in (rounded, images))
                measured[name] = metric(*pair).double().tolist()
        return measured

    @torch.inference_mode()
    def _add_features(self, key: str, images: Tensor) -> None:
        for name, network in self.suite.features.items():
            self.features[key, name].update(network(images))

    def _gather(self) -> None:
        """Combine the records and sums of all ranks, on every rank."""
        self.records = sorted(distributed.gather(self.records), key=lambda record: record["number"])
        for skipped in distributed.gather([self.photographs.skipped]):
            self.photographs.skipped.update(skipped)
        self.spectrum = reduce(add, distributed.gather([self.spectrum]))
        for sums in (self.latents, self.features):
            for key in sums:
                sums[key] = reduce(add, distributed.gather([sums[key]]))

    # ---------------------------------------------------------------- together

    def results(self) -> dict[str, Any]:
        """Row key -> description of the row and its metrics.

        A metric has its mean, its standard deviation (divisor n - 1) and the number of images n.
        """
        return {row.key: {**row.about(), "metrics": self._row_metrics(row.key)} for row in self.rows}

    def _row_metrics(self, key: str) -> dict[str, dict[str, float | int | None]]:
        metrics = {}
        for name in (*IMAGE_METRICS, *self.suite.further):
            values = [r["values"][key][name] for r in self.records if name in r["values"][key]]
            metrics[name] = {
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "n": len(values),
            }
        for name in SET_METRICS:
            metrics[name] = {"mean": None, "std": None, "n": 0}
            if name in self.suite.features and len(self.records) > 1:
                distance = frechet.frechet_distance(self.features["", name], self.features[key, name])
                metrics[name] = {"mean": distance, "std": None, "n": len(self.records)}
        return metrics

    def study(self, images: int, seed: int) -> dict[str, Any]:
        """Model name -> statistics of its latents over all images; under "study", the studies of `images` images.

        See `LatentSums.summary` and `latent_probes.summary`.
        """
        moments = {model.name: self.latents[model.name].summary() for model in self.models}
        numbers = self.study_numbers(images)
        pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
        tasks = [(model, i) for model in self.models for i in range(len(pairs))]
        place, found = distributed.join(), []
        mine = tasks[place.process_index :: place.num_processes]
        with distributed.failing_together():
            for model, i in tracked(mine, "studying latents", "pairs"):
                study = latent_probes.Study(model.vae, moments[model.name], self.suite.lpips, seed)
                pair = [(number, self._study_image(number, model)) for number in pairs[i]]
                found.append((model.name, i, study.of_pair(pair)))
        found = sorted(distributed.gather(found), key=lambda entry: entry[:2])
        return {
            name: {**summary, "study": latent_probes.summary([f for n, _, f in found if n == name])}
            for name, summary in moments.items()
        }

    def study_numbers(self, images: int) -> list[int]:
        """The numbers of at most `images` images, spread evenly over those that can be used."""
        numbers = [record["number"] for record in self.records]
        return [numbers[i] for i in np.unique(np.linspace(0, len(numbers) - 1, images).round().astype(int))]

    def _study_image(self, number: int, model: Model) -> Tensor:
        # all of one size, to interpolate between them; sides are multiples of 2f, so that halves are multiples of f
        image = self.photographs.at(number, self.photographs.size or STUDY_SIZE).image
        return pad_to_multiple(image, 2 * model.vae.downsampling)


def _save(folder: Path, batch: list[Photograph], images: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photograph, image in zip(batch, images, strict=True):
        save_image(image, folder / f"{photograph.number:06d}.png")
