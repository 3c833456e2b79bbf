"""The network's 3x3 convolutions with their gradients in fewer products, for training on a CPU in float32.

With B^T d B of an input tile d and G g G^T of a filter g, whose product A^T (.) A turns into an output tile (see
`winograd`),

- the gradient in the input is a convolution of the output's gradient with the filters mirrored and transposed;
- the gradient in the filter is G^T (sum over tiles of B^T d B * A dy A^T) G: 36 products a tile and channel pair
  where the definition takes 144.

What surrounds a convolution (normalisation and SiLU, upsampling) happens on the way into its windows, and again in
the backward pass, so that only the block's own input is kept.
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

PIXELS_A_THREAD = 2048  # about what its share of the caches holds
LEAST_CHANNELS, LEAST_PIXELS = 64, 2048  # fewer, and moving the filters costs more than the products saved


class Filters(NamedTuple):
    weight: Tensor
    bias: Tensor


class Tiles:
    """What `Executor.window` asks of a kernel: whole tiles of pixels."""

    up, down, tile, before, dtype = 1, 1, WinogradConv.tile, 1, torch.float32


class WinogradOps:
    """Winograd forms of `norm_silu_conv` and `upsample_conv` of `networks.convolutional`, with gradients.

    torch's own threads share each operation, as in inference. Scratch memory belongs to the Python thread that
    computes, so that several may train at once; a copy of a model or a pickled one begins without any.
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
        if not is_profitable(conv, x, x[:, 0].numel()):
            return recomputed_norm_silu_conv(norm, conv, x)
        return _NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm, self)

    def upsample_conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if not is_profitable(conv, x, 4 * x[:, 0].numel()):
            return upsample_conv(conv, x)
        return _UpsampleConv.apply(x, conv.weight, conv.bias, self)

    # ---------------------------------------------------------------- pieces of work

    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        b, _, width, _ = shape
        rows = PIXELS_A_THREAD * torch.get_num_threads() // (b * width) // Tiles.tile * Tiles.tile
        return pieces(Strips(shape, max(rows, Tiles.tile), Tiles.dtype, memory=None))

    def measured(self, x: Strips) -> Statistics:
        statistics = Statistics()
        for block in self.blocks(x.shape):
            statistics.add_and_measure(block.number, inside(x, block), None, self.work)
        return statistics

    def convolved(self, x: Strips, fill, filters: Filters) -> Tensor:
        """The convolution of fill(x), (B, H, W, out)."""
        kernel = WinogradConv(filters, self.work)
        y = torch.empty((*x.shape[:3], len(filters.weight)), device="cpu")
        for block in self.blocks(y.shape):
            y[:, block.top : block.bottom].copy_(self.executor.apply(kernel, x, block, fill))
        return y

    def filter_gradient(self, x: Strips, fill, dy: Strips) -> Tensor:
        """The gradient (out, in, 3, 3) in the filters that convolve fill(x), from that in the result, dy."""
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
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and pixels >= LEAST_PIXELS
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    )


class _NormSiluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias, norm, products):
        pixels = as_strips(x)
        statistics = products.measured(pixels)
        ctx.fill = Normalization(norm, statistics)
        ctx.moments = [m.flatten(1).float() for m in statistics.merge(norm.num_groups)]
        ctx.norm, ctx.products = norm, products
        ctx.save_for_backward(x, gamma, weight)
        return products.convolved(pixels, ctx.fill, Filters(weight, bias)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, gamma, weight = ctx.saved_tensors
        dy, pixels = as_strips(gradient), as_strips(x)
        d_weight = ctx.products.filter_gradient(pixels, ctx.fill, dy)
        d_activation = ctx.products.convolved(dy, copy, mirrored(weight)).permute(0, 3, 1, 2)
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
    @staticmethod
    def forward(ctx, x, weight, bias, products):
        ctx.products = products
        ctx.save_for_backward(x, weight)
        return products.convolved(upsampled(x), copy, Filters(weight, bias)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        dy = as_strips(gradient)
        d_weight = ctx.products.filter_gradient(upsampled(x), copy, dy)
        d_up = ctx.products.convolved(dy, copy, mirrored(weight))
        b, height, width, c = d_up.shape
        dx = d_up.view(b, height // 2, 2, width // 2, 2, c).sum(dim=(2, 4))
        return dx.permute(0, 3, 1, 2), d_weight, gradient.sum(dim=(0, 2, 3)), None


def as_strips(x: Tensor) -> Strips:
    """(B, C, H, W) as one strip of pixels."""
    pixels = x.permute(0, 2, 3, 1).contiguous()  # which it is in a model that is channels_last
    strips = Strips(pixels.shape, pixels.shape[1], pixels.dtype, memory=None)
    strips.strips = [pixels]
    return strips


def upsampled(x: Tensor) -> Strips:
    return as_strips(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def mirrored(weight: Tensor) -> Filters:
    """The filters of the transposed convolution, which computes the gradient in the input."""
    return Filters(weight.flip(2, 3).transpose(0, 1), weight.new_zeros(weight.shape[1]))


def inside(x: Strips, block: Block) -> Tensor:
    return x.strips[0][:, block.top : block.bottom]


def whole_tiles(y: Tensor, work: Workspace) -> Tensor:
    """y padded by zeros to whole tiles: beyond the image the gradient is zero."""
    b, height, width, c = y.shape
    rows, columns = (-(-n // 4) * 4 for n in (height, width))
    if (rows, columns) == (height, width):
        return y
    padded = work.get("padded", (b, rows, columns, c), y.dtype).zero_()
    padded[:, :height, :width] = y
    return padded
