"""Choose a part of an image (centre, random, aspect-ratio bucket), read no more than it needs, and scale it."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .colours import orientation, to_channels
from .image_io import cover_box, image_size, resize_box

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the decoded crop still has at least this many times the sides
# of the target; the rest of the scaling is bicubic. Measured for 1024-pixel JPEGs scaled to 256: twice as many
# images a second for crops of 768 pixels and more, at a PSNR of 40 to 48 dB to the crop from the full decode. A
# margin of 1 would be faster still, but aliases (gradients 6 % too large).
JPEG_MARGIN = 1.5
CROPS = ("centre", "random", "buckets")
BUCKET_STEPS = 16  # sides of buckets are multiples of size / 16: of 64 at 1024, as in SDXL


class TooSmall(ValueError):
    """Raised for an image that would have to be enlarged to cover the target size."""


class Crop(NamedTuple):
    """A crop of an image; its aspect ratio is that of the target size it is read at.

    scale: area of the crop, in (0, 1], 1 being the largest crop of that aspect ratio. x, y in [0, 1): position of
    the crop, from the leftmost (0) to the rightmost, and from the topmost (0) to the lowest. flip: mirror left to
    right.
    """

    scale: float
    x: float
    y: float
    flip: bool


@dataclass(frozen=True)
class Part:
    """What `read_part` returns: the part `box` (left, top, right, bottom) of an upright image of `size` (H, W)."""

    pixels: np.ndarray  # the part, scaled to the target: (h, w, C) uint8, a quarter of a float tensor's bytes
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def images(self) -> Tensor:
        """The pixels as a tensor (C, h, w), float32 in [-1, 1]."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 127.5 - 1


def buckets(size: int, multiple: int) -> list[tuple[int, int]]:
    """Return the sizes (H, W) of aspect-ratio buckets with about size^2 pixels each (0.9 to 1 times as many).

    Sides lie between size / 2 and 2 * size; they are multiples of a step of size / 16, rounded to a multiple of
    `multiple`. At `size` 1024 these are SDXL's buckets (Podell et al. 2023, appendix I).
    """
    step = max(round(size / BUCKET_STEPS / multiple), 1) * multiple
    sides = range(-(-size // (2 * step)) * step, 2 * size + 1, step)
    return [(height, width) for height in sides for width in sides if 0.9 <= height * width / size**2 <= 1]


def nearest_bucket(size: tuple[int, int], choices: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the one of `choices` nearest to `size` in log aspect ratio, in a tie the largest; all (H, W)."""
    ratio = math.log(size[0] / size[1])
    return min(choices, key=lambda hw: (abs(math.log(hw[0] / hw[1]) - ratio), -hw[0] * hw[1]))


def read_part(
    file: BinaryIO,
    targets: Sequence[tuple[int, int]],
    rng: random.Random | None = None,
    channels: int = 3,
) -> Part:
    """Read the largest crop with the aspect ratio of one of `targets` (H, W), scaled to that target.

    The target is the one whose aspect ratio is nearest to the image's. The crop is central, or with `rng` at a
    random place. Colours, orientation and `channels` are as in `image_io.open_image`; a large JPEG is decoded at a
    fraction of its size (`JPEG_MARGIN`). Raises TooSmall if the image would have to be enlarged, ValueError if it
    cannot be read.
    """
    height, width = image_size(file)  # refuses bombs and formats that no photograph has
    target = nearest_bucket((height, width), targets)
    scale = max(target[0] / height, target[1] / width)
    if scale > 1:
        raise TooSmall(f"{width}x{height} pixels, too small for {target[1]}x{target[0]}")
    place = (rng.random(), rng.random()) if rng else (0.5, 0.5)
    box = cover_box((height, width), target, *place)
    with _open_downscaled(file, JPEG_MARGIN * scale * min(height, width)) as image:
        upright = to_channels(image, channels)
    shrunk = upright.width / width, upright.height / height
    scaled = box if upright.size == (width, height) else tuple(b * shrunk[i % 2] for i, b in enumerate(box))
    pixels = np.array(resize_box(upright, scaled, *target))
    return Part(pixels.reshape(*target, channels), (height, width), box)


def read_crop(
    file: BinaryIO, target: tuple[int, int], crop: Crop, enlarge: bool = False, channels: int = 3
) -> np.ndarray:
    """Read a crop of an image, scaled (bicubic, antialiased) to `target` (H, W) -> (H, W, channels), uint8.

    The crop lies on whole pixels and is at least as large as `target`, whatever `crop.scale`, unless the image is
    smaller. Colours are as in `to_channels`; orientation and the reduced decoding of JPEGs as in `read_part`.
    Raises TooSmall if the image does not cover `target`, unless `enlarge`; ValueError if it cannot be read.
    """
    height, width = image_size(file)  # refuses bombs and formats that no photograph has
    if not covers((height, width), target) and not enlarge:
        raise TooSmall(f"{width}x{height} pixels, too small for {target[1]}x{target[0]}")
    largest = _largest_with_ratio((height, width), target)
    share = math.sqrt(crop.scale)
    sides = [max(round(full * share), min(goal, full)) for full, goal in zip(largest, target, strict=True)]
    short = min(height, width)
    with _open_downscaled(file, JPEG_MARGIN * target[0] * short / sides[0]) as image:
        image.load()
        shrunk = min(image.size) / short
        if orientation(image) >= 5:  # stored on its side
            sides.reverse()
        high, wide = (
            min(max(1, round(side * shrunk)), most)
            for side, most in zip(sides, (image.height, image.width), strict=True)
        )
        left, top = int(crop.x * (image.width - wide + 1)), int(crop.y * (image.height - high + 1))
        # Cropped before the colours are converted, so that fewer pixels are.
        part = to_channels(image.crop((left, top, left + wide, top + high)), channels)
    pixels = np.atleast_3d(part.resize((target[1], target[0]), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if crop.flip else pixels


def covers(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether an image of `size` is at least as high and as wide as `target`, both (H, W)."""
    return size[0] >= target[0] and size[1] >= target[1]


def _largest_with_ratio(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Size of the largest crop with the aspect ratio of `target` in an image of `size`; all (H, W) in pixels."""
    (height, width), (high, wide) = size, target
    if height * wide <= width * high:
        return height, max(1, round(height * wide / high))
    return max(1, round(width * high / wide)), width


@contextmanager
def _open_downscaled(file: BinaryIO, short_side: float) -> Iterator[Image.Image]:
    """Open an image; a JPEG at the smallest of 1, 1/2, 1/4 or 1/8 of its size that keeps `short_side` pixels."""
    file.seek(0)
    with Image.open(file) as image:
        wanted = math.ceil(short_side)
        image.draft(None, (wanted, wanted))  # has an effect on JPEGs only
        yield image
