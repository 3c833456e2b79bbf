"""Choose the size of training crops, one for all samples of a step, by `data.resolution` and `data.buckets`.

The size is the same on every rank and in every micro-batch of a step, so that all samples count alike in the loss
and no rank waits for another with larger images.
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

PERMUTE_RESOLUTIONS, PERMUTE_STEPS, PERMUTE_IMAGES = 1, 2, 3  # in the keys of permutations: what is permuted

Size = tuple[int, int]  # (height, width)


class Steps(NamedTuple):
    """Numbers the optimizer steps of a run.

    samples: samples of a step, over all ranks. first: the sample at which the run starts or continues.
    """

    samples: int
    first: int = 0

    def of(self, sample: int) -> int:
        """The number, from 0, of the step that takes `sample`; the same in a continued run with equal `samples`."""
        return -(-self.first // self.samples) + (sample - self.first) // self.samples


class Sizes:
    """The crop size of each sample, a function of the seed, its step and, with buckets, the bucket of its image.

    resolutions: sides in pixels; each cycle of len(resolutions) steps takes each once, in an order of its own.
    targets: the sizes (H, W) of the buckets in use at the first resolution; None for square crops. multiple: sides
    of buckets are multiples of it.
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
        self._bucket_at = {
            (side, target): nearest_bucket(target, buckets(side, multiple))
            for side in resolutions
            for target in targets or ()
        }

    def of(self, sample: int, bucket: int = 0) -> Size:
        """Size (H, W) in pixels of the crop of `sample`, if its image is in bucket number `bucket`."""
        side = self._resolution(self.steps.of(sample))
        return self._bucket_at[side, self.targets[bucket]] if self.targets else (side, side)

    def _resolution(self, step: int) -> int:
        sides = self.resolutions
        if len(sides) == 1:
            return sides[0]
        cycle, place = divmod(step, len(sides))
        return sides[permutation(len(sides), self.seed, cycle, PERMUTE_RESOLUTIONS)[place]]


class Buckets(NamedTuple):
    """The buckets of a source. sizes: (H, W) of each. of_image: (images,), the bucket number of each image."""

    sizes: list[Size]
    of_image: np.ndarray

    def members(self) -> list[np.ndarray]:
        """For each bucket the numbers of its images, (images of the bucket,)."""
        return [np.flatnonzero(self.of_image == number) for number in range(len(self.sizes))]


def sort_into_buckets(images: Sequence[Size | None], resolution: int, multiple: int, fewest: int) -> Buckets:
    """Sort images, by their sizes (H, W), into the buckets of nearest aspect ratio.

    The buckets are `crops.buckets(resolution, multiple)`, as in `encode-dataset`. A bucket with fewer than `fewest`
    images (the samples of a step) is not used; its images go to the nearest bucket in use. If all have fewer, the
    fullest is used. An image that cannot be read (size None) goes to the fullest bucket.
    """
    targets = buckets(resolution, multiple)
    full = Counter(nearest_bucket(size, targets) for size in images if size is not None)
    [(fullest, _)] = full.most_common(1) or [((resolution, resolution), 0)]
    used = sorted(target for target, images in full.items() if images >= fewest) or [fullest]
    number = {target: place for place, target in enumerate(used)}
    nearest = [fullest if size is None else nearest_bucket(size, used) for size in images]
    return Buckets(used, np.array([number[target] for target in nearest]))


def read_sizes(images: "TrainImages") -> list[Size | None]:
    """Size (H, W) of each training image, from its header; None for one that cannot be read."""
    return [_size_of(*images.record(i)) for i in tracked(range(len(images)), "reading sizes", "images")]


def _size_of(record: dict, name: str) -> Size | None:
    try:
        return image_size(encoded_file(record, name))
    except (ValueError, OSError):  # reported when its sample is read
        return None


def describe_sizes(resolutions: Sequence[int], buckets: Buckets | None, samples: int) -> str:
    """A line for the start of a run that names the sizes of crops; "" if all are squares of one size."""
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
