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

from .colours import to_channels
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
    """A square part of an image.

    scale: its area as a share of the largest square's, in (0, 1]. x, y in [0, 1): its place between the leftmost
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


def read_square(
    file: BinaryIO, resolution: int, crop: Crop, enlarge: bool = False, channels: int = 3
) -> np.ndarray:
    """Read a square crop of an image, scaled (bicubic, antialiased): (resolution, resolution, channels), uint8.

    The crop has whole pixels and is at least `resolution` wide unless the image itself is smaller. Colours as in
    `to_channels`, orientation and reduced decoding of JPEGs as in `read_part`. Raises TooSmall if it would be
    enlarged, unless `enlarge`; ValueError if it cannot be read.
    """
    height, width = image_size(file)  # refuses bombs and formats that no photograph has
    short = min(height, width)
    if short < resolution and not enlarge:
        raise TooSmall(f"{width}x{height} pixels, too small for {resolution}x{resolution}")
    side = max(round(short * math.sqrt(crop.scale)), min(resolution, short))
    with _opened_reduced(file, JPEG_MARGIN * resolution * short / side) as image:
        image.load()
        side = max(1, round(side * min(image.size) / short))
        left, top = int(crop.x * (image.width - side + 1)), int(crop.y * (image.height - side + 1))
        # cropped first, so that few pixels are converted
        square = to_channels(image.crop((left, top, left + side, top + side)), channels)
    pixels = np.atleast_3d(square.resize((resolution, resolution), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if crop.flip else pixels


@contextmanager
def _opened_reduced(file: BinaryIO, short_side: float) -> Iterator[Image.Image]:
    """Open an image; a JPEG at the smallest fraction of its size whose short side is at least `short_side`."""
    file.seek(0)
    with Image.open(file) as image:
        wanted = math.ceil(short_side)
        image.draft(None, (wanted, wanted))  # other formats than JPEG ignore it
        yield image
