"""`Strips`: an activation stored as strips of rows, each allocated at its first write and freed separately."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .group_norm import Statistics
from .memory import Arena, DeviceMemory, Workspace


@dataclass(frozen=True)
class Block:
    """Rows [top, bottom) of an activation: one piece of work, `number` among them."""

    number: int
    top: int
    bottom: int

    def scaled(self, up: int, down: int) -> "Block":
        """Return the block with its rows multiplied by up / down."""
        return Block(self.number, self.top * up // down, self.bottom * up // down)


class Strips:
    """An activation of `shape` (B, height, width, channels), stored as strips, and its GroupNorm statistics.

    Strips have `rows` rows, the last one perhaps fewer. `memory` allocates and frees them.
    """

    def __init__(self, shape: tuple[int, ...], rows: int, dtype: torch.dtype, memory: Arena | DeviceMemory):
        self.shape, self.rows, self.dtype, self.memory = shape, rows, dtype, memory
        self.strips: list[Tensor | None] = [None] * -(-shape[1] // rows)
        self.statistics = Statistics()
        self.lock = threading.Lock()

    def put(self, block: Block, y: Tensor, work: Workspace, add: bool = False) -> None:
        """Store y (B, rows, columns, channels) as the rows of a block, and add it to the statistics.

        add: add y to the present values of the block instead. y may be overwritten, or become the strip itself. A
        block lies within one strip.
        """
        self.statistics.add_and_measure(block.number, y, self.get(block) if add else None, work)
        i = block.top // self.rows
        if self.memory.adopts and y.dtype == self.dtype and block.bottom - block.top == self.rows_of(i):
            self.strips[i] = y
        else:
            self.place(block).copy_(y, non_blocking=True)

    def get(self, block: Block) -> Tensor:
        """Return the rows of a block on the device that computes: (B, rows, columns, channels)."""
        return self.place(block)

    def read(self, top: int, bottom: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows [top, bottom) strip by strip, as (number of the first row, rows)."""
        for i in self.covering(top, bottom):
            first = i * self.rows
            yield max(top, first), self.strips[i][:, max(top - first, 0) : bottom - first]

    def covering(self, top: int, bottom: int) -> range:
        """Return the numbers of the strips that hold rows [top, bottom), which may reach beyond the activation."""
        return range(max(top, 0) // self.rows, -(-min(bottom, self.shape[1]) // self.rows))

    def place(self, block: Block) -> Tensor:
        """Return a view of the rows of a block where they are stored; allocates its strip if there is none."""
        b, _, width, channels = self.shape
        i = block.top // self.rows
        first = i * self.rows
        with self.lock:
            if self.strips[i] is None:
                self.strips[i] = self.memory.empty((b, self.rows_of(i), width, channels), self.dtype)
        return self.strips[i][:, block.top - first : block.bottom - first]

    def rows_of(self, i: int) -> int:
        """Return the number of rows of strip i."""
        return min(self.rows, self.shape[1] - i * self.rows)

    def free(self, i: int) -> None:
        """Free strip i, if it is allocated."""
        if self.strips[i] is not None:
            self.memory.free(self.strips[i])
            self.strips[i] = None


class HostStrips(Strips):
    """Strips in host memory; `get` and `read` return copies on `device`."""

    def __init__(self, *args, device: torch.device):
        super().__init__(*args)
        self.device = device

    def get(self, block: Block) -> Tensor:
        return super().get(block).to(self.device, non_blocking=True)

    def read(self, top: int, bottom: int) -> Iterator[tuple[int, Tensor]]:
        for first, piece in super().read(top, bottom):
            yield first, piece.to(self.device, non_blocking=True)
