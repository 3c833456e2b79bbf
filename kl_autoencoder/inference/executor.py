"""Exact execution of Encoder and Decoder, piece by piece, in bounded memory and in cache; for inference.

An activation (B, C, H, W) is kept as strips of rows, and a strip is freed as soon as nothing will read it any more.
What makes the result that of the whole image:

- GroupNorm's statistics are global: each piece is measured while it is still in cache, and the measurements merged.
- A convolution reads a window one pixel larger than what it writes, normalised and activated on the way in, with
  zeros only where the image ends.
- Attention sees all positions.

So a ResNet block holds its input and one activation more: its output is added onto the input.
"""

import math
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.convolutional import AttentionBlock, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from .group_norm import Normalization, Statistics, copy
from .layers import Layers, out_channels, projections
from .memory import Arena, DeviceMemory, Workspace
from .module_kinds import in_order, kind, weights_on_device
from .strips import Block, HostStrips, Strips
from .workers import Workers

TILE = 4  # strip heights are multiples of it
NEXT_LEVEL = 4  # what a level holds, of its input: two activations, at most twice as wide


class Executor:
    """One run of a network: its threads, its memory, its strip heights.

    Args:
        x: what the network will get.
        workers: the threads that share the work.
        strip_bytes: the size of a strip, about.
        rows: the height of every strip instead, a multiple of 4.
        offload: keep activations in host memory.
        dtype: of the activations, if not that of x.
        call_layers: see `Layers`.
    """

    def __init__(
        self,
        x: Tensor,
        workers: Workers,
        strip_bytes: int,
        rows: int | None = None,
        offload: bool = False,
        dtype: torch.dtype | None = None,
        call_layers: bool = False,
    ):
        self.device, self.dtype = x.device, dtype or x.dtype
        self.layers = Layers(self.device, self.dtype, call_layers)
        self.workers, self.strip_bytes, self.fixed_rows, self.offload = workers, strip_bytes, rows, offload
        on_gpu = x.device.type == "cuda"
        self.memory = DeviceMemory(x.device) if on_gpu and not offload else Arena(pinned=on_gpu)
        self.local = threading.local()  # a workspace for each thread

    @property
    def work(self) -> Workspace:
        if not hasattr(self.local, "work"):
            self.local.work = Workspace(self.device)
        return self.local.work

    # ---------------------------------------------------------------- the network

    def run(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        steps = {
            ResnetBlock: self.resnet,
            AttentionBlock: self.attention,
            Downsample: self.downsample,
            Upsample: self.upsample,
        }
        with weights_on_device(network.conv_in):
            h = self.first(network.conv_in, x)
        for block in in_order(network):
            with weights_on_device(block):
                h = steps[kind(block)](block, h)
        with weights_on_device(network.conv_norm_out), weights_on_device(network.conv_out):
            return self.last(network.conv_norm_out, network.conv_out, h)

    def first(self, conv: nn.Conv2d, x: Tensor) -> Strips:
        pixels = x.permute(0, 2, 3, 1)
        source = Strips(pixels.shape, x.shape[2], x.dtype, self.memory)
        source.strips = [pixels]
        return self.convolve(source, self.layers.conv(conv, self.work), out_channels(conv), keep=True)

    def last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Strips) -> Tensor:
        kernel, fill = self.layers.conv(conv, self.work), Normalization(norm, x.statistics)
        b, height, width, _ = x.shape
        y = torch.empty((b, out_channels(conv), height, width), device=self.device, dtype=self.dtype)

        def task(block: Block) -> None:
            part = y[:, :, block.top : block.bottom]
            part.copy_(self.apply(kernel, x, block, fill).permute(0, 3, 1, 2))

        self.sweep(task, x, kernel, consumes=x)
        return y

    def resnet(self, block: ResnetBlock, x: Strips) -> Strips:
        shape = (*x.shape[:3], out_channels(block.conv1))
        same = block.conv_shortcut is None or isinstance(block.conv_shortcut, nn.Identity)
        out = x if same else self.strips(shape, x.rows)
        h = self.strips(shape, x.rows)
        if shape[3] < x.shape[3]:
            self.work.drop("filters")  # those from here on are smaller
        kernel, fill = self.layers.conv(block.conv1, self.work), Normalization(block.norm1, x.statistics)

        def inner(part: Block) -> None:
            h.put(part, self.apply(kernel, x, part, fill), self.work)
            if not same:
                out.place(part).copy_(self.layers.pointwise(block.conv_shortcut, x.get(part), self.work))

        self.sweep(inner, h, kernel, consumes=None if same else x)

        kernel, fill = self.layers.conv(block.conv2, self.work), Normalization(block.norm2, h.statistics)
        out.statistics = Statistics()

        def outer(part: Block) -> None:
            out.put(part, self.apply(kernel, h, part, fill), self.work, add=True)

        self.sweep(outer, out, kernel, consumes=h)
        return out

    def upsample(self, block: Upsample, x: Strips) -> Strips:
        return self.convolve(x, self.layers.upsample(block.conv, self.work), out_channels(block.conv))

    def downsample(self, block: Downsample, x: Strips) -> Strips:
        larger = math.prod(x.shape) * self.dtype.itemsize
        self.memory.trim(larger + larger // 4)  # what goes in and what comes out
        out = self.convolve(x, self.layers.downsample(block.conv, self.work), out_channels(block.conv))
        self.memory.trim(NEXT_LEVEL * math.prod(out.shape) * self.dtype.itemsize)
        return out

    def attention(self, block: AttentionBlock, x: Strips) -> Strips:
        b, height, width, channels = x.shape
        norm = Normalization(block.group_norm, x.statistics, silu=False)
        key, value = torch.empty((2, b, 1, height * width, channels), device=self.device, dtype=self.dtype)
        parts = pieces(x)
        to_q, to_k, to_v = projections(block)
        for part in parts:
            tokens, positions = self.tokens(norm, x, part), slice(part.top * width, part.bottom * width)
            key[:, :, positions] = self.layers.linear(to_k, tokens)
            value[:, :, positions] = self.layers.linear(to_v, tokens)
        x.statistics = Statistics()
        for part in parts:
            query = self.layers.linear(to_q, self.tokens(norm, x, part))
            mixed = F.scaled_dot_product_attention(query, key, value)
            y = self.layers.linear(block.to_out[0], mixed).view(b, -1, width, channels)
            x.put(part, y, self.work, add=True)
        return x

    def tokens(self, norm: Normalization, x: Strips, part: Block) -> Tensor:
        """The normalised positions of a part, (B, 1, positions, channels): one head."""
        pixels = x.get(part)
        tokens = torch.empty(pixels.shape, device=self.device, dtype=self.dtype)
        norm(pixels, tokens, self.work)
        return tokens.flatten(1, 2)[:, None]

    # ---------------------------------------------------------------- pieces of work

    def convolve(self, x: Strips, kernel, channels: int, keep: bool = False) -> Strips:
        b, height, width, _ = x.shape
        out = self.strips((b, height * kernel.up // kernel.down, width * kernel.up // kernel.down, channels))

        def task(block: Block) -> None:
            out.put(block, self.apply(kernel, x, block, copy), self.work)

        self.sweep(task, out, kernel, consumes=None if keep else x, cuts=kernel.down**2)
        return out

    def apply(self, kernel, x: Strips, block: Block, fill: Callable) -> Tensor:
        """The part `block` of kernel(fill(x)), where zeros surround the image."""
        window = self.window(x, block.scaled(kernel.down, kernel.up), kernel, fill)
        height, width = block.bottom - block.top, x.shape[2] * kernel.up // kernel.down
        return kernel(window, self.work)[:, :height, :width]

    def window(self, x: Strips, inside: Block, kernel, fill: Callable) -> Tensor:
        """fill(x) on `inside`, one pixel after it and `kernel.before`, with zeros outside of the image.

        Rows and columns are rounded up to whole tiles of the kernel.
        """
        (b, height, width, channels), before = x.shape, kernel.before
        rows, columns = (
            -(-n // kernel.tile) * kernel.tile + before + 1 for n in (inside.bottom - inside.top, width)
        )
        window = self.work.get("window", (b, rows, columns, channels), kernel.dtype)
        top, bottom = max(inside.top - before, 0), min(inside.bottom + 1, height)
        down = inside.top - before  # where the window begins
        window[:, : top - down].zero_()
        window[:, bottom - down :].zero_()
        window[:, :, :before].zero_()
        window[:, :, before + width :].zero_()
        for first, piece in x.read(top, bottom):
            fill(
                piece,
                window[:, first - down : first - down + piece.shape[1], before : before + width],
                self.work,
            )
        return window

    def sweep(self, task: Callable, out: Strips, kernel, consumes: Strips | None, cuts: int = 1) -> None:
        """Run task(block) on all blocks of `out`; free each strip of `consumes` when its last reader is done.

        With `cuts` a block is so many times smaller than a strip: where it is made of so many times more pixels.
        """
        blocks = pieces(out, cuts)
        if consumes is None:
            return self.workers.run(task, blocks)

        def reads(block: Block) -> range:
            inside = block.scaled(kernel.down, kernel.up)
            return consumes.covering(inside.top - kernel.before, inside.bottom + 1)

        readers = [0] * len(consumes.strips)
        for block in blocks:
            for i in reads(block):
                readers[i] += 1
        lock = threading.Lock()

        def task_and_free(block: Block) -> None:
            task(block)
            with lock:
                for i in reads(block):
                    readers[i] -= 1
                    if readers[i] == 0:
                        consumes.free(i)

        self.workers.run(task_and_free, blocks)
        for i in range(len(consumes.strips)):  # an odd row at the bottom may have had no reader
            consumes.free(i)

    def strips(self, shape: tuple[int, ...], rows: int | None = None) -> Strips:
        b, _, width, channels = shape
        fitting = self.strip_bytes // (b * width * channels * self.dtype.itemsize) // TILE * TILE
        rows = rows or self.fixed_rows or max(fitting, TILE)
        if self.offload:
            return HostStrips(shape, rows, self.dtype, self.memory, device=self.device)
        return Strips(shape, rows, self.dtype, self.memory)


def pieces(x: Strips, cuts: int = 1) -> list[Block]:
    """The blocks of x, `cuts` (which divide the rows) for each strip."""
    height, rows = x.shape[1], x.rows // cuts
    return [Block(number, top, min(top + rows, height)) for number, top in enumerate(range(0, height, rows))]
