"""The sizes of training images: one for all samples of a step, by `data.resolution` and `data.buckets`.

A step has the same size on every rank and in every micro-batch, so that each of its samples counts as much in the
loss as any other, and no rank waits for one with larger images.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kl_autoencoder.data.crops import buckets, nearest_bucket
from kl_autoencoder.data.image_io import image_size
from kl_autoencoder.data.sources import encoded_file
from kl_autoencoder.progress import tracked

from .samples import permutation

if TYPE_CHECKING:
    from .random_access import TrainImages

RESOLUTIONS, STEPS, IMAGES = 1, 2, 3  # of the keys of permutations: what is permuted

Size = tuple[int, int]  # (height, width)


class Steps(NamedTuple):
    """The steps of a run: `samples` each, counted from sample `first`, where the run starts or continues."""

    samples: int
    first: int = 0

    def of(self, sample: int) -> int:
        """The number of the step that takes a sample: the same after a restart with as many samples a step."""
        return -(-self.first // self.samples) + (sample - self.first) // self.samples


class Sizes:
    """The size of each sample, a function of the seed, its step and, with buckets, its image.

    Of several resolutions every cycle of steps has each once, in an order of its own. targets: the buckets that are
    used, as they are at the first resolution; None for squares. multiple: of which sides have to be.
    """

    def __init__(
        self,
        resolutions: Sequence[int],
        seed: int,
        steps: Steps,
        targets: Sequence[Size] | None = None,
        multiple: int = 1,
    ):
        self.resolutions, self.seed, self.steps, self.targets = resolutions, seed, steps, targets
        self.scaled = {
            (side, target): nearest_bucket(target, buckets(side, multiple))
            for side in resolutions
            for target in targets or ()
        }

    def of(self, sample: int, bucket: int = 0) -> Size:
        """(H, W) of a sample, whose image is in the bucket of that number."""
        side = self._resolution(self.steps.of(sample))
        return self.scaled[side, self.targets[bucket]] if self.targets else (side, side)

    def _resolution(self, step: int) -> int:
        sides = self.resolutions
        if len(sides) == 1:
            return sides[0]
        cycle, place = divmod(step, len(sides))
        return sides[permutation(len(sides), self.seed, cycle, RESOLUTIONS)[place]]


class Buckets(NamedTuple):
    """The buckets of a source. sizes: (H, W) of each. of_image: (images,) the number of each image's bucket."""

    sizes: list[Size]
    of_image: np.ndarray

    def members(self) -> list[np.ndarray]:
        """The numbers of the images of each bucket."""
        return [np.flatnonzero(self.of_image == number) for number in range(len(self.sizes))]


def sort_into_buckets(images: Sequence[Size | None], resolution: int, multiple: int, fewest: int) -> Buckets:
    """Sort images, by their sizes, into the buckets of nearest aspect ratio that `encode-dataset` has.

    Buckets of fewer than `fewest` images, those of a step, are not used, and their images go to the nearest of the
    others; the fullest bucket is always used. An image whose size is None, since it cannot be read, goes there too.
    """
    targets = buckets(resolution, multiple)
    full = Counter(nearest_bucket(size, targets) for size in images if size is not None)
    [(fullest, _)] = full.most_common(1) or [((resolution, resolution), 0)]
    used = sorted(target for target, images in full.items() if images >= fewest) or [fullest]
    number = {target: place for place, target in enumerate(used)}
    nearest = [fullest if size is None else nearest_bucket(size, used) for size in images]
    return Buckets(used, np.array([number[target] for target in nearest]))


def read_sizes(images: "TrainImages") -> list[Size | None]:
    """(H, W) of each training image, from its header; None for one that cannot be read."""
    return [_size_of(*images.record(i)) for i in tracked(range(len(images)), "reading sizes", "images")]


def _size_of(record: dict, name: str) -> Size | None:
    try:
        return image_size(encoded_file(record, name))
    except (ValueError, OSError):  # it is named when its sample is read
        return None


def announced(resolutions: Sequence[int], buckets: Buckets | None, samples: int) -> str:
    """A line for the start of a run: the sizes that its crops have; "" where all are squares of one size."""
    if buckets is None:
        squares = ", ".join(f"{side}x{side}" for side in resolutions)
        return f"crops of {squares}, one a step in turn" if len(resolutions) > 1 else ""
    counts = np.bincount(buckets.of_image)
    sizes = ", ".join(
        f"{high}x{wide} ({images:,})" for (high, wide), images in zip(buckets.sizes, counts, strict=True)
    )
    others = "".join(f" and at {side}" for side in resolutions[1:])
    kinds = "1 bucket" if len(counts) == 1 else f"{len(counts)} buckets"
    return (
        f"crops of {kinds}, one for the {samples} samples of a step; height x width (images) at "
        f"{resolutions[0]}{others}: {sizes}"
    )
