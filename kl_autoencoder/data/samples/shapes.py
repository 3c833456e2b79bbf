"""Images with known factors, after dSprites (Matthey et al. 2017): one shape on black, drawn by number.

Six independent, uniform factors: kind, scale, rotation, x, y, as in dSprites, and hue, which is added. Rotation and
hue are limited to ranges in which no two values look the same (a square looks the same after 90 degrees, a hue
after 360).
"""

import colorsys
import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .drawing import Points, coverage

SIDE = 64  # pixels
KINDS = ("square", "ellipse", "heart")
SCALE = (9.0, 18.0)  # pixels from the centre to the outermost point
ROTATION = (-40.0, 40.0)  # degrees, clockwise
PLACE = (SCALE[1], SIDE - SCALE[1])  # pixels, x and y of the centre; a shape never leaves the image
HUE = (0.0, 2 / 3)  # of HSV, in turns: red, yellow, green, blue
CURVE_POINTS = 128  # points of a curve; the polygon's area is that of the ellipse to 4e-4


class Shape(NamedTuple):
    """The factors of an image: kind (index in `KINDS`), scale (pixels), rotation (degrees), x, y (pixels), hue."""

    kind: int
    scale: float
    rotation: float
    x: float
    y: float
    hue: float


def shape(number: int) -> Shape:
    """The factors of image `number`, the same in every process and version."""
    rng = random.Random(f"shape/{number}")  # the same numbers in all versions of Python
    kind = int(rng.random() * len(KINDS))
    ranges = (SCALE, ROTATION, PLACE, PLACE, HUE)
    return Shape(kind, *(low + (high - low) * rng.random() for low, high in ranges))


def draw(shape: Shape) -> NDArray[np.uint8]:
    """Draw a shape at full brightness and saturation on black, exactly antialiased: (64, 64, 3) RGB."""
    turn = math.radians(shape.rotation)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    polygon = shape.scale * OUTLINES[shape.kind] @ rotation + (shape.x, shape.y)
    colour = np.array(colorsys.hsv_to_rgb(shape.hue, 1.0, 1.0))
    return np.rint(255 * coverage(polygon, SIDE)[..., None] * colour).astype(np.uint8)


def _ellipse() -> Points:
    t = np.linspace(0, 2 * math.pi, CURVE_POINTS, endpoint=False)
    return np.stack([np.cos(t), 0.5 * np.sin(t)], axis=1)


def _heart() -> Points:
    """The heart curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, point down."""
    t = np.linspace(0, 2 * math.pi, CURVE_POINTS, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([x, y - 2.5], axis=1)  # centres its bounding box
    return points / np.linalg.norm(points, axis=1).max()


_SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)
OUTLINES = (_SQUARE, _ellipse(), _heart())  # in the order of `KINDS`; the outermost point has distance 1
