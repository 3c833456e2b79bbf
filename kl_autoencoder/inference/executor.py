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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.convolutional import AttentionBlock, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from . import winograd
from .conv import DirectConv, DirectDownsample, DirectUpsample
from .group_norm import Normalization, Statistics, copy
from .memory import Arena, DeviceMemory, Workspace
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
    """

    def __init__(
        self, x: Tensor, workers: Workers, strip_bytes: int, rows: int | None = None, offload: bool = False
    ):
        self.device, self.dtype = x.device, x.dtype
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
        with at_hand(network.conv_in):
            h = self.first(network.conv_in, x)
        for block in in_order(network):
            with at_hand(block):
                h = steps[type(block)](block, h)
        with at_hand(network.conv_norm_out), at_hand(network.conv_out):
            return self.last(network.conv_norm_out, network.conv_out, h)

    def first(self, conv: nn.Conv2d, x: Tensor) -> Strips:
        pixels = x.permute(0, 2, 3, 1)
        source = Strips(pixels.shape, x.shape[2], x.dtype, self.memory)
        source.strips = [pixels]
        return self.convolve(source, self.kernel(conv), conv.out_channels, keep=True)

    def last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Strips) -> Tensor:
        kernel, fill = self.kernel(conv), Normalization(norm, x.statistics)
        b, height, width, _ = x.shape
        y = torch.empty((b, conv.out_channels, height, width), device=self.device, dtype=self.dtype)

        def task(block: Block) -> None:
            part = y[:, :, block.top : block.bottom]
            part.copy_(self.apply(kernel, x, block, fill).permute(0, 3, 1, 2))

        self.sweep(task, x, kernel, consumes=x)
        return y

    def resnet(self, block: ResnetBlock, x: Strips) -> Strips:
        shape = (*x.shape[:3], block.conv1.out_channels)
        same = isinstance(block.conv_shortcut, nn.Identity)
        out = x if same else self.strips(shape, x.rows)
        h = self.strips(shape, x.rows)
        kernel, fill = self.kernel(block.conv1), Normalization(block.norm1, x.statistics)

        def inner(part: Block) -> None:
            h.put(part, self.apply(kernel, x, part, fill), self.work)
            if not same:
                out.place(part).copy_(shortcut(block.conv_shortcut, x.get(part), self.work))

        self.sweep(inner, h, kernel, consumes=None if same else x)

        kernel, fill = self.kernel(block.conv2), Normalization(block.norm2, h.statistics)
        out.statistics = Statistics()

        def outer(part: Block) -> None:
            out.put(part, self.apply(kernel, h, part, fill), self.work, add=True)

        self.sweep(outer, out, kernel, consumes=h)
        return out

    def upsample(self, block: Upsample, x: Strips) -> Strips:
        fewer_products = winograd.pays(block.conv, self.device, self.dtype, upsampling=True)
        kernel = (winograd.WinogradUpsample if fewer_products else DirectUpsample)(block.conv, self.work)
        return self.convolve(x, kernel, block.conv.out_channels)

    def downsample(self, block: Downsample, x: Strips) -> Strips:
        out = self.convolve(x, DirectDownsample(block.conv, self.work), block.conv.out_channels)
        self.memory.trim(NEXT_LEVEL * math.prod(out.shape) * self.dtype.itemsize)
        return out

    def attention(self, block: AttentionBlock, x: Strips) -> Strips:
        b, height, width, channels = x.shape
        norm = Normalization(block.group_norm, x.statistics, silu=False)
        key, value = torch.empty((2, b, 1, height * width, channels), device=self.device, dtype=self.dtype)
        parts = pieces(x)
        for part in parts:
            tokens, positions = self.tokens(norm, x, part), slice(part.top * width, part.bottom * width)
            key[:, :, positions] = linear(block.to_k, tokens)
            value[:, :, positions] = linear(block.to_v, tokens)
        x.statistics = Statistics()
        for part in parts:
            query = linear(block.to_q, self.tokens(norm, x, part))
            mixed = F.scaled_dot_product_attention(query, key, value)
            y = linear(block.to_out[0], mixed).view(b, -1, width, channels)
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

        self.sweep(task, out, kernel, consumes=None if keep else x)
        return out

    def apply(self, kernel, x: Strips, block: Block, fill: Callable) -> Tensor:
        """The block of kernel(fill(x)), zeros around the image."""
        window = self.window(x, block.scaled(kernel.down, kernel.up), kernel, fill)
        height, width = block.bottom - block.top, x.shape[2] * kernel.up // kernel.down
        return kernel(window, self.work)[:, :height, :width]

    def window(self, x: Strips, inside: Block, kernel, fill: Callable) -> Tensor:
        """fill(x) on the rows and one pixel around them, with zeros outside the image and up to whole tiles."""
        b, height, width, channels = x.shape
        rows, columns = (-(-n // kernel.tile) * kernel.tile + 2 for n in (inside.bottom - inside.top, width))
        window = self.work.get("window", (b, rows, columns, channels), kernel.dtype)
        top, bottom = max(inside.top - 1, 0), min(inside.bottom + 1, height)
        down = inside.top - 1  # where the window begins
        window[:, : top - down].zero_()
        window[:, bottom - down :].zero_()
        window[:, :, :1].zero_()
        window[:, :, width + 1 :].zero_()
        for first, piece in x.read(top, bottom):
            fill(piece, window[:, first - down : first - down + piece.shape[1], 1 : width + 1], self.work)
        return window

    def sweep(self, task: Callable, out: Strips, kernel, consumes: Strips | None) -> None:
        """task(block) for blocks that cover `out`; strips of `consumes` are freed when the last reader is done."""
        blocks = pieces(out)
        if consumes is None:
            return self.workers.run(task, blocks)

        def reads(block: Block) -> range:
            inside = block.scaled(kernel.down, kernel.up)
            return consumes.covering(inside.top - 1, inside.bottom + 1)

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

    def kernel(self, conv: nn.Conv2d):
        fewer_products = winograd.pays(conv, self.device, self.dtype)
        return (winograd.WinogradConv if fewer_products else DirectConv)(conv, self.work)

    def strips(self, shape: tuple[int, ...], rows: int | None = None) -> Strips:
        b, _, width, channels = shape
        fitting = self.strip_bytes // (b * width * channels * self.dtype.itemsize) // TILE * TILE
        rows = rows or self.fixed_rows or max(fitting, TILE)
        if self.offload:
            return HostStrips(shape, rows, self.dtype, self.memory, device=self.device)
        return Strips(shape, rows, self.dtype, self.memory)


def pieces(x: Strips) -> list[Block]:
    """One a strip."""
    height = x.shape[1]
    tops = range(0, height, x.rows)
    return [Block(number, top, min(top + x.rows, height)) for number, top in enumerate(tops)]


def offloading_hook(module: nn.Module):
    """What accelerate's sequential offloading has put on a module; its weights are elsewhere between two uses."""
    hook = getattr(module, "_hf_hook", None)
    return hook if hasattr(hook, "weights_map") else None


@contextmanager
def at_hand(block: nn.Module) -> Iterator[None]:
    """Within it, the weights of the block are on the device, also if accelerate keeps them elsewhere."""
    hooks = [(m, offloading_hook(m)) for m in block.modules() if offloading_hook(m)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)


def in_order(network: Encoder | Decoder) -> list[nn.Module]:
    """The blocks between conv_in and conv_norm_out."""
    if isinstance(network, Encoder):
        stages = [*network.down_blocks, network.mid_block]
    else:
        stages = [network.mid_block, *network.up_blocks]
    return [block for stage in stages for block in stage.blocks()]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def shortcut(conv: nn.Conv2d, x: Tensor, work: Workspace) -> Tensor:
    """A 1x1 convolution: a matrix product for every pixel."""
    pixels = x if x.is_contiguous() else work.get("window", x.shape, x.dtype).copy_(x)
    pixels = pixels.flatten(0, 2)
    y = work.get("half", (len(pixels), conv.out_channels), x.dtype)
    torch.addmm(conv.bias, pixels, conv.weight.flatten(1).t(), out=y)
    return y.view(*x.shape[:3], -1)
