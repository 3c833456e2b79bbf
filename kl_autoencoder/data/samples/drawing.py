"""Draw polygons with exact antialiasing: the value of a pixel is the share of its area that is covered."""

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (N, 2): x from the left, y from the top, in pixels


def coverage(polygon: Points, size: int) -> NDArray[np.float64]:
    """Covered share, 0 to 1, of each pixel of a square image: corners (N, 2) of a closed polygon -> (size, size).

    The signed-area accumulation of font renderers (Green's theorem). The boundary is cut into pieces that lie
    within one pixel each. A piece of height h (positive if it runs down, negative if up) covers, in its row,
    everything to its right: h * (1 - x) of its own pixel, where x in [0, 1] is the mean position in that pixel, and
    h of each pixel further right. Adding h * (1 - x) to its own pixel and h * x to the next makes the cumulative
    sum along the row the coverage. Raises ValueError for a polygon that leaves the image.
    """
    if polygon.min() < 0 or polygon.max() > size:
        raise ValueError(f"polygon from {polygon.min():g} to {polygon.max():g}; allowed: 0 to {size}")
    pieces = _split_at_pixel_borders(_subdivide_edges(polygon))
    start, end = pieces[:-1], pieces[1:]
    height = end[:, 1] - start[:, 1]
    middle = (start + end) / 2  # a piece lies in the pixel of its middle
    column, row = np.minimum(middle.astype(int), size - 1).T
    right = 1 - (middle[:, 0] - column)  # share of the pixel's width to the right of the piece
    area = np.zeros((size, size + 1))
    np.add.at(area, (row, column), height * right)
    np.add.at(area, (row, column + 1), height * (1 - right))
    return np.abs(area.cumsum(axis=1)[:, :size]).clip(0, 1)


def _subdivide_edges(polygon: Points) -> Points:
    """Close the polygon and add points until no edge is longer than half a pixel: (M, 2), first = last."""
    closed = np.vstack([polygon, polygon[:1]])
    steps = np.ceil(2 * np.linalg.norm(np.diff(closed, axis=0), axis=1)).astype(int).clip(1)
    along = np.concatenate([i + np.arange(n) / n for i, n in enumerate(steps)] + [[len(steps)]])
    corners = np.arange(len(closed))
    return np.stack([np.interp(along, corners, closed[:, axis]) for axis in (0, 1)], axis=1)


def _split_at_pixel_borders(points: Points) -> Points:
    """Add a point wherever the boundary passes from pixel to pixel: (M, 2) -> (3 * (M - 1) + 1, 2).

    Edges are at most half a pixel long, so that each crosses at most one border in x and one in y.
    """
    start, step = points[:-1], np.diff(points, axis=0)
    border = np.maximum(np.floor(start), np.floor(points[1:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (border - start) / step
    # Where an edge crosses no border, its start is added again: a piece of length 0.
    at = np.sort(np.where((at > 0) & (at < 1), at, 0.0), axis=1)
    pieces = np.stack([start, start + at[:, :1] * step, start + at[:, 1:] * step], axis=1)
    return np.vstack([pieces.reshape(-1, 2), points[-1:]])
