"""Execute an Encoder or Decoder exactly, piece by piece, in little memory and within the caches; for inference.

An activation (B, C, H, W) is stored as strips of rows, and a strip is freed after its last read. The result is that
of the whole image, because

- GroupNorm's statistics are global: each piece is measured while it is in cache, and the measurements are merged;
- a convolution reads a window one pixel larger at each side than the block of rows it writes, also from
  neighbouring strips; only outside of the image is the window zero. Normalisation and SiLU are applied as it is
  filled;
- attention sees all positions.

    strips of x:    |  strip 0  |  strip 1  |  strip 2  |      (rows from top to bottom)
    window read:               [.-----------.]                 . one row of a neighbouring strip
    block written:              |  strip 1  |

A ResNet block adds its output onto its input, so that it needs memory for only one more activation.
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
from .module_kinds import blocks_in_order, kind, weights_on_device
from .strips import Block, HostStrips, Strips
from .workers import Workers

TILE = 4  # heights of strips are multiples of this many rows
# Memory of a level, in units of its input: two activations, with at most twice the channels.
LEVEL_MEMORY = 4


class Executor:
    """Runs a network on one input, with the threads, the memory and the strip heights of that run.

    Args:
        x: the network's input, (B, C, H, W); device and dtype are taken from it.
        workers: the threads that share the work.
        strip_bytes: approximate size of a strip, in bytes.
        rows: height of every strip in rows, a multiple of 4, instead of `strip_bytes`.
        offload: keep activations in host memory.
        dtype: of the activations; that of x by default.
        call_layers: call convolutions and linear layers as modules, see `Layers`.
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
        self.local = threading.local()  # holds a workspace for each thread

    @property
    def work(self) -> Workspace:
        """The scratch memory of the calling thread."""
        if not hasattr(self.local, "work"):
            self.local.work = Workspace(self.device)
        return self.local.work

    # ---------------------------------------------------------------- the network

    def run(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        """Return network(x): (B, C, H, W) -> as the network's `forward`."""
        steps = {
            ResnetBlock: self.resnet,
            AttentionBlock: self.attention,
            Downsample: self.downsample,
            Upsample: self.upsample,
        }
        with weights_on_device(network.conv_in):
            h = self.input_layer(network.conv_in, x)
        for block in blocks_in_order(network):
            with weights_on_device(block):
                h = steps[kind(block)](block, h)
        with weights_on_device(network.conv_norm_out), weights_on_device(network.conv_out):
            return self.output_layers(network.conv_norm_out, network.conv_out, h)

    def input_layer(self, conv: nn.Conv2d, x: Tensor) -> Strips:
        """Compute conv_in of x (B, C, H, W), which is kept."""
        pixels = x.permute(0, 2, 3, 1)
        source = Strips(pixels.shape, x.shape[2], x.dtype, self.memory)
        source.strips = [pixels]
        return self.convolve(source, self.layers.conv(conv, self.work), out_channels(conv), keep=True)

    def output_layers(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Strips) -> Tensor:
        """Compute conv_out(SiLU(norm(x))), (B, C, H, W); frees x."""
        kernel, fill = self.layers.conv(conv, self.work), Normalization(norm, x.statistics)
        b, height, width, _ = x.shape
        y = torch.empty((b, out_channels(conv), height, width), device=self.device, dtype=self.dtype)

        def task(block: Block) -> None:
            part = y[:, :, block.top : block.bottom]
            part.copy_(self.apply(kernel, x, block, fill).permute(0, 3, 1, 2))

        self.sweep(task, x, kernel, consumes=x)
        return y

    def resnet(self, block: ResnetBlock, x: Strips) -> Strips:
        """Compute a ResNet block; its result overwrites x if it has as many channels."""
        shape = (*x.shape[:3], out_channels(block.conv1))
        same = block.conv_shortcut is None or isinstance(block.conv_shortcut, nn.Identity)
        out = x if same else self.strips(shape, x.rows)
        h = self.strips(shape, x.rows)
        if shape[3] < x.shape[3]:
            self.work.drop("filters")  # all filters from here on are smaller
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
        input_bytes = math.prod(x.shape) * self.dtype.itemsize
        self.memory.trim(input_bytes + input_bytes // 4)  # input, and output of a quarter of its pixels
        out = self.convolve(x, self.layers.downsample(block.conv, self.work), out_channels(block.conv))
        self.memory.trim(LEVEL_MEMORY * math.prod(out.shape) * self.dtype.itemsize)
        return out

    def attention(self, block: AttentionBlock, x: Strips) -> Strips:
        """Compute an attention block; its result overwrites x. Keys and values of all positions are held."""
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
        """Return the normalised positions of a part of x, (B, 1, positions, channels); 1 is the number of heads."""
        pixels = x.get(part)
        tokens = torch.empty(pixels.shape, device=self.device, dtype=self.dtype)
        norm(pixels, tokens, self.work)
        return tokens.flatten(1, 2)[:, None]

    # ---------------------------------------------------------------- pieces of work

    def convolve(self, x: Strips, kernel, channels: int, keep: bool = False) -> Strips:
        """Compute kernel(x), with `channels` channels; frees the strips of x unless `keep`."""
        b, height, width, _ = x.shape
        out = self.strips((b, height * kernel.up // kernel.down, width * kernel.up // kernel.down, channels))

        def task(block: Block) -> None:
            out.put(block, self.apply(kernel, x, block, copy), self.work)

        self.sweep(task, out, kernel, consumes=None if keep else x, cuts=kernel.down**2)
        return out

    def apply(self, kernel, x: Strips, block: Block, fill: Callable) -> Tensor:
        """Return the rows `block` of kernel(fill(x)), with zeros around the image: (B, rows, columns, channels)."""
        window = self.window(x, block.scaled(kernel.down, kernel.up), kernel, fill)
        height, width = block.bottom - block.top, x.shape[2] * kernel.up // kernel.down
        return kernel(window, self.work)[:, :height, :width]

    def window(self, x: Strips, inside: Block, kernel, fill: Callable) -> Tensor:
        """Return the padded window that a kernel reads, zero outside of the image: (B, rows, columns, channels).

        It holds fill(x) on the rows `inside`, on `kernel.before` rows before them and on one row after them;
        columns likewise. Rows and columns of the inside are rounded up to multiples of `kernel.tile`.
        """
        (b, height, width, channels), before = x.shape, kernel.before
        rows, columns = (
            -(-n // kernel.tile) * kernel.tile + before + 1 for n in (inside.bottom - inside.top, width)
        )
        window = self.work.get("window", (b, rows, columns, channels), kernel.dtype)
        top, bottom = max(inside.top - before, 0), min(inside.bottom + 1, height)
        down = inside.top - before  # row of the image at which the window begins
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
        """Run task(block) for all blocks of `out`; free each strip of `consumes` after the last task that reads it.

        cuts: blocks in a strip. Downsampling reads down^2 times as many pixels as it writes, and so takes blocks
        smaller by that factor.
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
        for i in range(len(consumes.strips)):  # no task may have read an odd row at the bottom
            consumes.free(i)

    def strips(self, shape: tuple[int, ...], rows: int | None = None) -> Strips:
        """Return an empty activation (B, height, width, channels), in strips of `rows` rows or of `strip_bytes`."""
        b, _, width, channels = shape
        fitting = self.strip_bytes // (b * width * channels * self.dtype.itemsize) // TILE * TILE
        rows = rows or self.fixed_rows or max(fitting, TILE)
        if self.offload:
            return HostStrips(shape, rows, self.dtype, self.memory, device=self.device)
        return Strips(shape, rows, self.dtype, self.memory)


def pieces(x: Strips, cuts: int = 1) -> list[Block]:
    """Return the blocks of x, `cuts` of them for each strip; `cuts` must divide the rows of a strip."""
    height, rows = x.shape[1], x.rows // cuts
    return [Block(number, top, min(top + rows, height)) for number, top in enumerate(range(0, height, rows))]
