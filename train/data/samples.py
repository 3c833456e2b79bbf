"""One training sample: an encoded image -> a random crop, a function of the seed and the number of the sample."""

import logging
import random
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kl_autoencoder.data.crops import Crop, TooSmall, covers, nearest_bucket, read_crop
from kl_autoencoder.data.image_io import image_size
from kl_autoencoder.data.sources import encoded_file
from kl_autoencoder.files import one_line

from .labels import ClassOutOfRange, Labels

ATTEMPTS = 1000  # images in a row that cannot be used, after which the run ends
WARNED = 5  # the first skipped images are named in the log at once
REMEMBERED = 1000  # skipped images that are kept by name, and held in checkpoints
PRINTED = 20  # skipped images that are named at the end of a run

log = logging.getLogger(__name__)


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of 0 ... length-1, (length,), that depends on `key` alone, not on the version of numpy.

    numpy promises not to change the output of RandomState and SeedSequence (NEP 19).
    """
    return np.random.RandomState(np.random.SeedSequence(key).generate_state(8)).permutation(length)


def augmentation(seed: int, sample: int) -> random.Random:
    """The random generator of a sample, from which its crop and all else that is random about it is drawn."""
    return random.Random(f"{seed}/{sample}")  # a text seeds alike in all versions of Python


@dataclass(frozen=True)
class RandomCrops:
    """How crops are drawn and read.

    scale: range (low, high) of `Crop.scale`, within (0, 1], drawn uniformly. flip: mirror with probability 1/2.
    enlarge: scale up images that do not cover the size of a sample; otherwise they are skipped. channels: read gray
    (1), RGB (3) or RGBA (4). binarize: None, or the `kind` of `binarised`.
    """

    scale: tuple[float, ...]
    flip: bool
    enlarge: bool = False
    channels: int = 3
    binarize: str | None = None

    def draw(self, rng: random.Random) -> Crop:
        """Draw a crop by four numbers of `rng`."""
        low, high = self.scale
        # Of Python's generators only random() is promised to give the same numbers in later versions.
        share, x, y, mirror = (rng.random() for _ in range(4))
        return Crop(low + (high - low) * share, x, y, self.flip and mirror < 0.5)


def binarised(levels: np.ndarray, kind: str, rng: random.Random) -> np.ndarray:
    """Make gray levels black and white: uint8, 0 to 255, any shape -> uint8, 0 or 255, the same shape.

    `kind` "fixed": 255 from level 128 on. "dynamic": 255 with probability level / 255 (Burda et al. 2016, section
    5); one number of `rng` seeds the draw.
    """
    if kind == "fixed":
        return np.where(levels >= 128, np.uint8(255), np.uint8(0))
    # RandomState is the one generator of numpy whose output never changes (NEP 19).
    chance = np.random.RandomState(int(rng.random() * 2**32)).random_sample(levels.shape)
    return np.where(chance < levels / 255, np.uint8(255), np.uint8(0))


def read_sample(
    crops: RandomCrops,
    size: tuple[int, int],
    sample: int,
    rng: random.Random,
    records: Iterable[tuple[dict, str]],
    labels: Labels | None = None,
) -> dict:
    """Read sample number `sample`, a random crop of `size` (H, W), from the first of `records` that can be used.

    records: (record, name) of the sample's own image, then of those that may replace it. labels: gives the number
    of a record's class. Returns {"image": (H, W, C) uint8, "sample": number, "skipped": [(name, reason), ...], and,
    with `labels`, "label": int}. Raises ValueError if none of the first `ATTEMPTS` records can be used, and
    ClassOutOfRange for a class out of range.
    """
    crop, skipped = crops.draw(rng), []
    for record, name in islice(records, ATTEMPTS):
        try:
            file = encoded_file(record, name)
            pixels = read_crop(file, size, crop, crops.enlarge, crops.channels)
            label = {} if labels is None else {"label": labels(record)}
        except ClassOutOfRange:
            raise
        except TooSmall as error:
            skipped.append((name, f"too small: {error}"))
        except Exception as error:  # on damaged bytes, decoders may raise anything
            message = getattr(error, "strerror", None) or str(error).removeprefix(f"{name}: ")
            message = message or type(error).__name__
            skipped.append((name, f"unreadable: {message}"))
        else:
            pixels = binarised(pixels, crops.binarize, rng) if crops.binarize else pixels
            return {"image": pixels, "sample": sample, "skipped": skipped, **label}
    first = ": ".join(skipped[0])
    raise ValueError(f"data.train: none of {len(skipped)} images could be used, the first: {first}")


def failure(error: Exception) -> dict:
    """Return {"failure": one line}, which a worker passes on in place of a sample or batch.

    Raising the error would end the worker, and the traceback would keep the loader alive. The traceback of errors
    other than ValueError and OSError is printed, since bad data do not explain them.
    """
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exc()
    message = one_line(error) or type(error).__name__
    return {"failure": message if message.startswith("data.") else f"data.train: {message}"}


def collate(samples: list[dict]) -> dict:
    """Collate the results of `read_sample` to a batch, or return the first failure among them.

    The batch is {"images": (B, C, H, W) uint8, or None without samples, "sample": (B,) int64, "skipped": [(name,
    reason), ...] of all samples and, where they have labels, "labels": (B,) int64}.
    """
    for sample in samples:
        if "failure" in sample:
            return sample
    batch = {
        "images": _stack([sample["image"] for sample in samples]) if samples else None,
        "sample": torch.tensor([sample["sample"] for sample in samples], dtype=torch.int64),
        "skipped": [image for sample in samples for image in sample["skipped"]],
    }
    if samples and "label" in samples[0]:
        batch["labels"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    return batch


def _stack(images: list[np.ndarray]) -> Tensor:
    """Images (H, W, C) -> (B, C, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def check_images(
    source: str,
    enlarge: bool,
    resolution: int,
    targets: Sequence[tuple[int, int]],
    records: list[tuple[dict, str]],
) -> None:
    """Refuse, before any work starts, a training source that cannot be read or is too small for the crops.

    records: (record, name) of some of its images. targets: the sizes (H, W) of crops at the largest `resolution`;
    an image takes the one of nearest aspect ratio. Raises ValueError if none of the images can be read, or all are
    too small and not to be enlarged; warns if some are.
    """
    sizes, errors = [], []
    for record, name in records:
        try:
            sizes.append(image_size(encoded_file(record, name)))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if not sizes:
        reason = (
            f"none of the {len(errors)} looked at can be read, the first: {errors[0]}" if errors else "none"
        )
        raise ValueError(f"data.train: no readable images in {source} ({reason})")
    nearest = [nearest_bucket(size, targets) for size in sizes]
    small = sum(not covers(size, target) for size, target in zip(sizes, nearest, strict=True))
    if enlarge or not small:
        return
    if small == len(sizes):
        largest = max(
            min(size[i] * resolution // target[i] for i in (0, 1))
            for size, target in zip(sizes, nearest, strict=True)
        )
        longest = "the longest of their short sides, " if len(targets) == 1 else ""
        raise ValueError(
            f"data.resolution: {resolution}, larger than the {len(sizes)} images of {source} that were "
            f"looked at; allowed: at most {longest}{largest}, or data.too_small=enlarge"
        )
    log.warning(
        "%d of %d images of %s that were looked at are smaller than the crops of %d pixels: such are skipped "
        "(data.too_small: skip)", small, len(sizes), source, resolution,
    )  # fmt: skip


class SkippedImages:
    """The images that could not be used in a run because they are unreadable or too small.

    At most `REMEMBERED` are kept by name. The first `WARNED` are logged when they are met; `summary` names
    `PRINTED`.
    """

    def __init__(self):
        self.reasons: dict[str, str] = {}  # name -> "too small: ..." or "unreadable: ..."
        self.more = False  # whether more than `REMEMBERED` images were skipped

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Add the images that a batch skipped, as (name, reason)."""
        for name, reason in skipped:
            if name in self.reasons:
                continue
            if len(self.reasons) == REMEMBERED:
                self.more = True
                continue
            if len(self.reasons) < WARNED:
                log.warning("skipped %s: %s", name, reason)
            self.reasons[name] = reason

    def __len__(self) -> int:
        return len(self.reasons)

    def state(self) -> dict:
        """The state to save in a checkpoint, for `merge`."""
        return {"reasons": self.reasons, "more": self.more}

    def merge(self, state: dict) -> None:
        """Add the `state` of another rank, or of the run before an interruption; nothing is logged."""
        for name, reason in state["reasons"].items():
            if name in self.reasons or len(self.reasons) < REMEMBERED:
                self.reasons[name] = reason
            else:
                self.more = True
        self.more |= state["more"]

    def summary(self) -> str:
        """Text for the end of a run: how many images were skipped and why, and the first `PRINTED` by name."""
        if not self.reasons:
            return "no images were skipped"
        small = sum(reason.startswith("too small") for reason in self.reasons.values())
        count = f"more than {len(self)}" if self.more else len(self)
        head = f"{count} images were skipped ({small} too small, {len(self) - small} unreadable"
        head += f" of the first {len(self)}):" if self.more else "):"
        lines = [f"{name}: {reason}" for name, reason in islice(self.reasons.items(), PRINTED)]
        rest = [f"... and {len(self) - PRINTED} more"] if len(self) > PRINTED else []
        return "\n  ".join([head, *lines, *rest])
