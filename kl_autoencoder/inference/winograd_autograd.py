"""3x3 convolutions with fewer multiplications, and their gradients, for training on a CPU in float32.

Forward (see `winograd`), for an input tile d and a filter g: y = A^T [(G g G^T) * (B^T d B)] A. Gradients:

- in the input: the convolution of the output's gradient with the mirrored and transposed filters;
- in the filter: G^T [sum over tiles of (B^T d B) * (A dy A^T)] G, 36 products for each tile and pair of channels
  instead of 144.

The operations before a convolution (GroupNorm and SiLU, or upsampling) are computed while its windows are filled,
and computed again in the backward pass, so that only their input is kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..networks.convolutional import recomputed_norm_silu_conv, upsample_conv
from .executor import Executor, pieces
from .group_norm import Normalization, Statistics, copy
from .memory import Workspace
from .strips import Block, Strips
from .winograd import FILTER_4, WinogradConv, input_tiles, output_gradient_tiles, tiles_shape
from .workers import Workers

PIXELS_A_THREAD = 2048  # in a block: about what a thread's share of the caches holds
LEAST_CHANNELS, LEAST_PIXELS = 64, 2048  # below, transforming the filters costs more than it saves


class Filters(NamedTuple):
    """What `WinogradConv` reads of a convolution: weight (out, in, 3, 3) and bias (out,)."""

    weight: Tensor
    bias: Tensor


class Tiles:
    """The attributes of a kernel that `Executor.window` reads, for windows of whole 4x4 tiles."""

    up, down, tile, before, dtype = 1, 1, WinogradConv.tile, 1, torch.float32


class WinogradOps:
    """`norm_silu_conv` and `upsample_conv` of `networks.convolutional` by Winograd's algorithm, with gradients.

    torch's own threads share each operation. Each Python thread has its own scratch memory, so that several may
    train at once; copying or pickling leaves scratch memory behind.
    """

    def __init__(self):
        device = torch.device("cpu")
        self.executor = Executor(torch.empty(0, device=device), Workers(1, device), strip_bytes=0)

    def __reduce__(self):
        return WinogradOps, ()

    @property
    def work(self) -> Workspace:
        """The calling thread's scratch memory."""
        return self.executor.work

    def norm_silu_conv(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(SiLU(norm(x))): (B, in, H, W) -> (B, out, H, W); by torch where Winograd's is not profitable."""
        if not is_profitable(conv, x, x[:, 0].numel()):
            return recomputed_norm_silu_conv(norm, conv, x)
        return _NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm, self)

    def upsample_conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Upsampling by two, then conv: (B, C, H, W) -> (B, out, 2H, 2W); by torch where that is faster."""
        if not is_profitable(conv, x, 4 * x[:, 0].numel()):
            return upsample_conv(conv, x)
        return _UpsampleConv.apply(x, conv.weight, conv.bias, self)

    # ---------------------------------------------------------------- pieces of work

    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        """Return blocks of rows, of whole tiles, that fit into the caches; shape: (B, H, W, C)."""
        b, _, width, _ = shape
        rows = PIXELS_A_THREAD * torch.get_num_threads() // (b * width) // Tiles.tile * Tiles.tile
        return pieces(Strips(shape, max(rows, Tiles.tile), Tiles.dtype, memory=None))

    def measured(self, x: Strips) -> Statistics:
        """Return the GroupNorm statistics of x."""
        statistics = Statistics()
        for block in self.blocks(x.shape):
            statistics.add_and_measure(block.number, inside(x, block), None, self.work)
        return statistics

    def convolved(self, x: Strips, fill, filters: Filters) -> Tensor:
        """Return the convolution of fill(x): (B, H, W, out)."""
        kernel = WinogradConv(filters, self.work)
        y = torch.empty((*x.shape[:3], len(filters.weight)), device="cpu")
        for block in self.blocks(y.shape):
            y[:, block.top : block.bottom].copy_(self.executor.apply(kernel, x, block, fill))
        return y

    def filter_gradient(self, x: Strips, fill, dy: Strips) -> Tensor:
        """Return the gradient (out, in, 3, 3) in the filters that convolve fill(x); dy is that in the result."""
        into, out = x.shape[3], dy.shape[3]
        total = torch.zeros((36, into, out), device="cpu")
        for block in self.blocks(dy.shape):
            window = self.executor.window(x, block, Tiles, fill)
            a = self.work.get("pixels", tiles_shape(window), window.dtype)
            input_tiles(window, a, self.work)
            b = output_gradient_tiles(whole_tiles(inside(dy, block), self.work), self.work)
            torch.baddbmm(total, a.view(36, -1, into).mT, b, out=total)
        both_sides = torch.kron(FILTER_4, FILTER_4).float()  # (36, 9)
        gradient = both_sides.t() @ total.flatten(1)
        return gradient.view(3, 3, into, out).permute(3, 2, 0, 1)


def is_profitable(conv: nn.Conv2d, x: Tensor, pixels: int) -> bool:
    """Whether training this convolution of x, with `pixels` output pixels in the batch, is faster by Winograd's."""
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and pixels >= LEAST_PIXELS
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    )


class _NormSiluConv(torch.autograd.Function):
    """conv(SiLU(GroupNorm(x))), which keeps only x for the backward pass."""

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, norm, ops):
        pixels = as_strips(x)
        statistics = ops.measured(pixels)
        ctx.fill = Normalization(norm, statistics)
        ctx.moments = [m.flatten(1).float() for m in statistics.merge(norm.num_groups)]
        ctx.norm, ctx.ops = norm, ops
        ctx.save_for_backward(x, gamma, weight)
        return ops.convolved(pixels, ctx.fill, Filters(weight, bias)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, gamma, weight = ctx.saved_tensors
        dy, pixels = as_strips(gradient), as_strips(x)
        d_weight = ctx.ops.filter_gradient(pixels, ctx.fill, dy)
        d_activation = ctx.ops.convolved(dy, copy, mirrored(weight)).permute(0, 3, 1, 2)
        scale, shift = (v[:, :, None, None] for v in (ctx.fill.scale, ctx.fill.shift))
        d_normal = torch.ops.aten.silu_backward(d_activation, torch.addcmul(shift, x, scale))
        mean, variance = ctx.moments
        b, c, height, width = x.shape
        dx, d_gamma, d_beta = torch.ops.aten.native_group_norm_backward(
            d_normal, x, mean, torch.rsqrt(variance + ctx.norm.eps), gamma,
            b, c, height * width, ctx.norm.num_groups, [True, True, True],
        )  # fmt: skip
        return dx, d_gamma, d_beta, d_weight, gradient.sum(dim=(0, 2, 3)), None, None


class _UpsampleConv(torch.autograd.Function):
    """Upsampling by two and a convolution, which keep only the small x for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, ops):
        ctx.ops = ops
        ctx.save_for_backward(x, weight)
        return ops.convolved(upsampled(x), copy, Filters(weight, bias)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        dy = as_strips(gradient)
        d_weight = ctx.ops.filter_gradient(upsampled(x), copy, dy)
        d_up = ctx.ops.convolved(dy, copy, mirrored(weight))
        b, height, width, c = d_up.shape
        dx = d_up.view(b, height // 2, 2, width // 2, 2, c).sum(dim=(2, 4))
        return dx.permute(0, 3, 1, 2), d_weight, gradient.sum(dim=(0, 2, 3)), None


def as_strips(x: Tensor) -> Strips:
    """x (B, C, H, W) as `Strips` of a single strip, (B, H, W, C)."""
    pixels = x.permute(0, 2, 3, 1).contiguous()  # no copy if x is in channels_last
    strips = Strips(pixels.shape, pixels.shape[1], pixels.dtype, memory=None)
    strips.strips = [pixels]
    return strips


def upsampled(x: Tensor) -> Strips:
    """x (B, C, H, W), upsampled by two, as `Strips` (B, 2H, 2W, C)."""
    return as_strips(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def mirrored(weight: Tensor) -> Filters:
    """Return the filters, with zero bias, that turn an output's gradient into the gradient in the input."""
    return Filters(weight.flip(2, 3).transpose(0, 1), weight.new_zeros(weight.shape[1]))


def inside(x: Strips, block: Block) -> Tensor:
    """Return the rows of a block of x, which has a single strip: (B, rows, W, C)."""
    return x.strips[0][:, block.top : block.bottom]


def whole_tiles(y: Tensor, work: Workspace) -> Tensor:
    """Pad a gradient y (B, rows, columns, C) to whole 4x4 tiles by zeros, its value beyond the image."""
    b, height, width, c = y.shape
    rows, columns = (-(-n // 4) * 4 for n in (height, width))
    if (rows, columns) == (height, width):
        return y
    padded = work.get("padded", (b, rows, columns, c), y.dtype).zero_()
    padded[:, :height, :width] = y
    return padded
