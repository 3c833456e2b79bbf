"""Split latents into tiles of at most 128x128 places. Each is a chunk of the file, which bounds memory."""

from collections.abc import Iterator

SIDE = 128  # places a side; 1024 pixels with f = 8


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of each tile of latents with height x width places, in row-major order."""
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            yield slice(top, min(top + SIDE, height)), slice(left, min(left + SIDE, width))


def count(height: int, width: int) -> int:
    """The number of `tiles`."""
    return -(-height // SIDE) * -(-width // SIDE)
