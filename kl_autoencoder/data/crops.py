"""Choose a part of an image (centre, random, aspect-ratio bucket, square), read only that, and scale it."""

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

# A JPEG is decoded at 1/2, 1/4 or 1/8 as long as the crop keeps this many times its final side, the rest being
# bicubic. Measured on 1024-pixel JPEGs to 256: twice the images a second from a crop of 768 on, 40 to 48 dB
# from the full decode; a margin of 1 would be faster still, but aliases (gradients 6 % too large).
JPEG_MARGIN = 1.5
CROPS = ("centre", "random", "buckets")
BUCKET_STEPS = 16  # a square's side in steps of the buckets, as SDXL's 64 in 1024


class TooSmall(ValueError):
    """An image that would have to be enlarged."""


class Crop(NamedTuple):
    """A part of an image, of a given aspect ratio.

    scale: its area as a share of the largest such part's, in (0, 1]. x, y in [0, 1): its place between the leftmost
    and the rightmost, the topmost and the lowest one. flip: mirror it left to right.
    """

    scale: float
    x: float
    y: float
    flip: bool


@dataclass(frozen=True)
class Part:
    """The result of `read_part`: the part `box` (left, top, right, bottom) of an upright image of `size` (H, W)."""

    pixels: np.ndarray  # the part, scaled: (h, w, C) uint8; cheaper than a tensor to send to another process
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def images(self) -> Tensor:
        """(C, h, w), float32 in [-1, 1]."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 127.5 - 1


def buckets(size: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of 0.9 to 1 times size^2 pixels, sides from size / 2 to 2 * size in steps of size / 16.

    The steps are rounded to `multiple`. At 1024 these are SDXL's buckets (Podell et al. 2023, appendix I).
    """
    step = max(round(size / BUCKET_STEPS / multiple), 1) * multiple
    sides = range(-(-size // (2 * step)) * step, 2 * size + 1, step)
    return [(height, width) for height in sides for width in sides if 0.9 <= height * width / size**2 <= 1]


def nearest_bucket(size: tuple[int, int], choices: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `choices` (H, W) whose aspect ratio is nearest to that of `size` (H, W); of two, the larger."""
    ratio = math.log(size[0] / size[1])
    return min(choices, key=lambda hw: (abs(math.log(hw[0] / hw[1]) - ratio), -hw[0] * hw[1]))


def read_part(
    file: BinaryIO,
    targets: Sequence[tuple[int, int]],
    rng: random.Random | None = None,
    channels: int = 3,
) -> Part:
    """Read the largest part of an image that has a target's aspect ratio, scaled to that target (H, W).

    The target is the one of nearest aspect ratio; the part is the centre, or with `rng` at a random place. Colours
    and orientation as in `image_io.open_image`, `channels` as there; a large JPEG is decoded at a fraction of its
    size. Raises TooSmall if it would be enlarged, ValueError if it cannot be read.
    """
    height, width = image_size(file)  # refuses bombs and formats that no photograph has
    target = nearest_bucket((height, width), targets)
    scale = max(target[0] / height, target[1] / width)
    if scale > 1:
        raise TooSmall(f"{width}x{height} pixels, too small for {target[1]}x{target[0]}")
    place = (rng.random(), rng.random()) if rng else (0.5, 0.5)
    box = cover_box((height, width), target, *place)
    with _opened_reduced(file, JPEG_MARGIN * scale * min(height, width)) as image:
        upright = to_channels(image, channels)
    shrunk = upright.width / width, upright.height / height
    scaled = box if upright.size == (width, height) else tuple(b * shrunk[i % 2] for i, b in enumerate(box))
    pixels = np.array(resize_box(upright, scaled, *target))
    return Part(pixels.reshape(*target, channels), (height, width), box)


def read_crop(
    file: BinaryIO, target: tuple[int, int], crop: Crop, enlarge: bool = False, channels: int = 3
) -> np.ndarray:
    """Read a crop of an image, scaled (bicubic, antialiased) to `target` (H, W): (H, W, channels), uint8.

    The crop has whole pixels and at least those of the target unless the image itself has fewer. Colours as in
    `to_channels`, orientation and reduced decoding of JPEGs as in `read_part`. Raises TooSmall if it would be
    enlarged, unless `enlarge`; ValueError if it cannot be read.
    """
    height, width = image_size(file)  # refuses bombs and formats that no photograph has
    if not covers((height, width), target) and not enlarge:
        raise TooSmall(f"{width}x{height} pixels, too small for {target[1]}x{target[0]}")
    largest = _largest_part((height, width), target)
    share = math.sqrt(crop.scale)
    sides = [max(round(of * share), min(to, of)) for of, to in zip(largest, target, strict=True)]
    short = min(height, width)
    with _opened_reduced(file, JPEG_MARGIN * target[0] * short / sides[0]) as image:
        image.load()
        shrunk = min(image.size) / short
        if orientation(image) >= 5:  # stored on its side
            sides.reverse()
        high, wide = (
            min(max(1, round(side * shrunk)), most)
            for side, most in zip(sides, (image.height, image.width), strict=True)
        )
        left, top = int(crop.x * (image.width - wide + 1)), int(crop.y * (image.height - high + 1))
        # cropped first, so that few pixels are converted
        part = to_channels(image.crop((left, top, left + wide, top + high)), channels)
    pixels = np.atleast_3d(part.resize((target[1], target[0]), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if crop.flip else pixels


def covers(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether an image of a size (H, W) has a part of the size `target`."""
    return size[0] >= target[0] and size[1] >= target[1]


def _largest_part(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest part of an image of `size` with the aspect ratio of `target`, both (H, W)."""
    (height, width), (high, wide) = size, target
    if height * wide <= width * high:
        return height, max(1, round(height * wide / high))
    return max(1, round(width * high / wide)), width


@contextmanager
def _opened_reduced(file: BinaryIO, short_side: float) -> Iterator[Image.Image]:
    """Open an image; a JPEG at the smallest fraction of its size whose short side is at least `short_side`."""
    file.seek(0)
    with Image.open(file) as image:
        wanted = math.ceil(short_side)
        image.draft(None, (wanted, wanted))  # other formats than JPEG ignore it
        yield image
