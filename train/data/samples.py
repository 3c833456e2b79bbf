"""One training sample: an encoded photograph -> a random square crop, as a function of the seed and its number."""

import logging
import math
import random
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from kl_autoencoder.data.crops import JPEG_MARGIN
from kl_autoencoder.data.image_io import image_size, image_to_tensor, to_rgb
from kl_autoencoder.data.sources import encoded_file

ATTEMPTS = 1000  # unreadable images in a row after which a source counts as unreadable
WARNED = 5  # unreadable images that are named in the log at once

log = logging.getLogger(__name__)


def permutation(length: int, *key: int) -> np.ndarray:
    """0 ... length-1 in an order that depends on `key` alone, whichever version of numpy is installed.

    (RandomState and SeedSequence are the generators whose output numpy promises not to change, NEP 19.)
    """
    return np.random.RandomState(np.random.SeedSequence(key).generate_state(8)).permutation(length)


def augmentation(seed: int, sample: int) -> random.Random:
    return random.Random(f"{seed}/{sample}")  # Python promises that text seeds alike in all versions


class Crop(NamedTuple):
    """A square part of a photograph. `scale`: its area in that of the largest square; `x`, `y` in [0, 1): where,
    of the places there are; `flip`: mirrored left to right."""

    scale: float
    x: float
    y: float
    flip: bool


@dataclass(frozen=True)
class RandomCrops:
    """Crops of (resolution, resolution) whose scale is uniform in `scale`; `flip` mirrors half of them."""

    resolution: int
    scale: tuple[float, ...]
    flip: bool

    def draw(self, rng: random.Random) -> Crop:
        low, high = self.scale
        # random() alone is promised by Python to give the same sequence in later versions.
        share, x, y, mirror = (rng.random() for _ in range(4))
        return Crop(low + (high - low) * share, x, y, self.flip and mirror < 0.5)


def read_crop(record: dict | None, name: str, resolution: int, crop: Crop) -> Tensor:
    """An encoded image -> its crop, (3, resolution, resolution), float32 in [-1, 1], bicubic, antialiased.

    Colours as in `kl_autoencoder.data.image_io.to_rgb`. Raises ValueError naming the image if it cannot be read.
    """
    try:
        file = encoded_file(record, name)
        image_size(file)  # refuses bombs and formats that no photograph has
        file.seek(0)
        with Image.open(file) as image:
            short = min(image.size)
            side = max(round(short * math.sqrt(crop.scale)), min(resolution, short))
            wanted = math.ceil(JPEG_MARGIN * resolution * short / side)
            image.draft(None, (wanted, wanted))  # other formats than JPEG ignore it
            image.load()
            side = max(1, round(side * min(image.size) / short))
            left, top = int(crop.x * (image.width - side + 1)), int(crop.y * (image.height - side + 1))
            square = image.crop((left, top, left + side, top + side))
        return image_to_tensor(to_rgb(square).resize((resolution, resolution), Image.Resampling.BICUBIC))
    except Exception as error:  # decoders fed with damaged bytes raise nearly everything
        message = str(error) or type(error).__name__
        raise ValueError(message if message.startswith(name) else f"{name}: {message}") from error


def read_sample(
    crops: RandomCrops, sample: int, rng: random.Random, candidates: Iterable[tuple[dict, str]]
) -> dict:
    """Sample number `sample`, from the first of its candidates, (record, name), that can be read."""
    crop, skipped = crops.draw(rng), []
    for record, name in islice(candidates, ATTEMPTS):
        try:
            image = read_crop(record, name, crops.resolution, crop)
        except ValueError as error:
            skipped.append((name, str(error).removeprefix(f"{name}: ")))
            continue
        return {"image": image.flip(-1) if crop.flip else image, "sample": sample, "skipped": skipped}
    first = ": ".join(skipped[0])
    raise ValueError(f"data.train: none of {len(skipped)} images could be read, the first: {first}")


def failure(error: Exception) -> dict:
    """What a worker hands over in place of a sample that there is not: {"failure": one line}.

    An exception would end the worker, and its traceback would keep the loader alive. Of one that no data explains
    the traceback is printed.
    """
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exc()
    message = " ".join(str(error).split()) or type(error).__name__
    return {"failure": message if message.startswith("data.") else f"data.train: {message}"}


def collate(samples: list[dict]) -> dict:
    """Samples -> a batch, or the first failure among them."""
    for sample in samples:
        if "failure" in sample:
            return sample
    return {
        "images": default_collate([sample["image"] for sample in samples]),  # in a worker: into shared memory
        "sample": torch.tensor([sample["sample"] for sample in samples]),
        "skipped": [image for sample in samples for image in sample["skipped"]],
    }


def check_images(source: str, resolution: int, records: list[tuple[dict, str]]) -> None:
    """Refuse, before any work starts, a training source that is unreadable or too small for the crop."""
    sides, errors = [], []
    for record, name in records:
        try:
            sides.append(min(image_size(encoded_file(record, name))))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if not sides:
        reason = (
            f"none of the {len(errors)} looked at can be read, the first: {errors[0]}" if errors else "none"
        )
        raise ValueError(f"data.train: no readable images in {source} ({reason})")
    if max(sides) < resolution:
        raise ValueError(
            f"data.resolution: {resolution}, larger than the {len(sides)} images of {source} that were looked at; "
            f"allowed: at most the longest of their short sides, {max(sides)}"
        )


class SkippedImages:
    """The unreadable images met in a run, each once: the first few are warned of, all are counted and named."""

    def __init__(self):
        self.reasons: dict[str, str] = {}  # name: reason

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """`skipped`: that of a batch, (name, reason)."""
        for name, reason in skipped:
            if name not in self.reasons and len(self.reasons) < WARNED:
                log.warning("skipped an unreadable image, %s: %s", name, reason)
            self.reasons[name] = reason

    def __len__(self) -> int:
        return len(self.reasons)

    def summary(self) -> str:
        """Their number, then a line for each; "no unreadable images" where there were none."""
        if not self.reasons:
            return "no unreadable images"
        lines = (f"{name}: {reason}" for name, reason in self.reasons.items())
        return "\n  ".join([f"{len(self)} unreadable images were skipped:", *lines])
