"""Latents in tiles of at most 128x128 places, each a chunk of the file, so that coding takes bounded memory."""

from collections.abc import Iterator

SIDE = 128  # 1024 pixels at f8


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile of latents of height x width, row by row."""
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            yield slice(top, min(top + SIDE, height)), slice(left, min(left + SIDE, width))


def count(height: int, width: int) -> int:
    return -(-height // SIDE) * -(-width // SIDE)
