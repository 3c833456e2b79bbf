"""Polygons on a grid of pixels with exact antialiasing: each pixel gets the share of it that the polygon covers."""

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (N, 2): x, y in pixels, from the left and from the top


def coverage(polygon: Points, size: int) -> NDArray[np.float64]:
    """A closed polygon inside the picture -> (size, size), the covered share of each pixel, 0 to 1.

    By Green's theorem, as font renderers do it: what is covered right of an edge is, row by row, the edge's height
    in that row, and in the pixels that it passes the part of them that lies to its right. So each piece of the
    boundary, cut where it passes from pixel to pixel, adds height * (1 - mean x) to its own pixel and the rest of
    its height to the next; the sum along each row is the coverage. Pieces run down with a positive sign, up with
    a negative one. Raises ValueError for a polygon that leaves the picture.
    """
    if polygon.min() < 0 or polygon.max() > size:
        raise ValueError(f"polygon from {polygon.min():g} to {polygon.max():g}; allowed: 0 to {size}")
    pieces = _cut_at_pixels(_shortened(polygon))
    start, end = pieces[:-1], pieces[1:]
    height = end[:, 1] - start[:, 1]
    middle = (start + end) / 2
    column, row = np.minimum(middle.astype(int), size - 1).T
    right = 1 - (middle[:, 0] - column)
    area = np.zeros((size, size + 1))
    np.add.at(area, (row, column), height * right)
    np.add.at(area, (row, column + 1), height * (1 - right))
    return np.abs(area.cumsum(axis=1)[:, :size]).clip(0, 1)


def _shortened(polygon: Points) -> Points:
    """The closed boundary with points added so that no edge is longer than half a pixel: (M, 2), first = last."""
    closed = np.vstack([polygon, polygon[:1]])
    steps = np.ceil(2 * np.linalg.norm(np.diff(closed, axis=0), axis=1)).astype(int).clip(1)
    along = np.concatenate([i + np.arange(n) / n for i, n in enumerate(steps)] + [[len(steps)]])
    corners = np.arange(len(closed))
    return np.stack([np.interp(along, corners, closed[:, axis]) for axis in (0, 1)], axis=1)


def _cut_at_pixels(points: Points) -> Points:
    """The boundary with points added where it passes from pixel to pixel, by each edge once a direction."""
    start, step = points[:-1], np.diff(points, axis=0)
    border = np.maximum(np.floor(start), np.floor(points[1:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (border - start) / step
    at = np.sort(
        np.where((at > 0) & (at < 1), at, 0.0), axis=1
    )  # 0 adds the start once more, a piece of no length
    pieces = np.stack([start, start + at[:, :1] * step, start + at[:, 1:] * step], axis=1)
    return np.vstack([pieces.reshape(-1, 2), points[-1:]])
