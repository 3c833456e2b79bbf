"""Images with known factors, after dSprites (Matthey et al. 2017): one shape on black, drawn by number.

Six factors, independent and uniform: the kind; scale, rotation, x and y; and the hue, which dSprites has not.
Rotation and hue stay within ranges in which no two values look alike (a square repeats after 90 degrees, the hue
after a circle).
"""

import colorsys
import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .drawing import Points, coverage

SIDE = 64
KINDS = ("square", "ellipse", "heart")
SCALE = (9.0, 18.0)  # pixels from the centre to the outermost point
ROTATION = (-40.0, 40.0)  # degrees, clockwise
PLACE = (SCALE[1], SIDE - SCALE[1])  # of the centre, so that each shape is whole
HUE = (0.0, 2 / 3)  # red, yellow, green, blue
OUTLINE = 128  # points of a curve: the ellipse's area to 4e-4


class Shape(NamedTuple):
    """The factors of an image: kind (number in `KINDS`), scale (pixels), rotation (degrees), x, y (pixels), hue."""

    kind: int
    scale: float
    rotation: float
    x: float
    y: float
    hue: float


def shape(number: int) -> Shape:
    """The factors of image `number`."""
    rng = random.Random(f"shape/{number}")  # Python promises the same numbers in all versions
    kind = int(rng.random() * len(KINDS))
    ranges = (SCALE, ROTATION, PLACE, PLACE, HUE)
    return Shape(kind, *(low + (high - low) * rng.random() for low, high in ranges))


def draw(shape: Shape) -> NDArray[np.uint8]:
    """(64, 64, 3): the shape at full brightness and saturation on black, with exact antialiasing."""
    turn = math.radians(shape.rotation)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    polygon = shape.scale * OUTLINES[shape.kind] @ rotation + (shape.x, shape.y)
    colour = np.array(colorsys.hsv_to_rgb(shape.hue, 1.0, 1.0))
    return np.rint(255 * coverage(polygon, SIDE)[..., None] * colour).astype(np.uint8)


def _ellipse() -> Points:
    t = np.linspace(0, 2 * math.pi, OUTLINE, endpoint=False)
    return np.stack([np.cos(t), 0.5 * np.sin(t)], axis=1)


def _heart() -> Points:
    """The well-known curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, point down."""
    t = np.linspace(0, 2 * math.pi, OUTLINE, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([x, y - 2.5], axis=1)  # the middle of its height at the centre
    return points / np.linalg.norm(points, axis=1).max()


_SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
OUTLINES = (_SQUARE, _ellipse(), _heart())  # of `KINDS`, the outermost point at distance 1
