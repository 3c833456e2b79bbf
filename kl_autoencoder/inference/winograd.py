"""Minimal-filtering (Winograd) forms of the 3x3 convolutions, for inference on a CPU, computed in float32.

A 3x3 convolution of stride 1 computed on 4x4 output tiles takes 36 products a tile and channel pair where the
definition takes 144: F(4x4, 3x3) of Lavin & Gray 2016, "Fast algorithms for convolutional neural networks".
The points 0, +-11/16, +-3/2 round less than half as much as theirs (0, +-1, +-2). Against float64, relative rms
of one layer of 64 to 512 channels on a Zen 5: 5.8e-7 to 8.6e-7, where oneDNN's direct convolution has 2.2e-7 in
NCHW and 4.3e-7 to 1.2e-6 in channels_last. So Stable Diffusion's decoder is at 4.1e-6 of float64's, 2.9 times
diffusers' distance in NCHW and 0.6 times that in channels_last; its encoder at 3.2e-6, 3.7 and 0.9 times.

After nearest-neighbour upsampling by two, 2x2 outputs take 9 products instead of 36: of the 16 of F(2x2, 3x3),
7 multiply a difference of equal pixels. It rounds to 2.6e-7 to 4.1e-7, 1.2 to 1.7 times direct NCHW.

Called as the kernels of `convolutions` are. Everything is additions of slices and one batched matrix product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .memory import Workspace

A, B = 11 / 16, 3 / 2  # the points of F(4x4, 3x3) are 0, A, -A, B, -B and infinity


def is_profitable(
    conv: nn.Conv2d, device: torch.device, dtype: torch.dtype, upsampling: bool = False
) -> bool:
    """Whether fewer products in float32 are faster than all of them in `dtype`, by what the processor has.

    In bfloat16 torch's own convolution does twice float32's products a second with AVX512-BF16 (measured on a
    Zen 4: even at 128 channels, slower than this at 256), many times them with AMX, and fewer without either.
    """
    matrices = {torch.bfloat16: "amx_tile", torch.float16: "amx_fp16"}.get(dtype)
    if device.type != "cpu" or (matrices and _cpu_has(matrices)):
        return False
    twice_as_fast = dtype == torch.bfloat16 and _cpu_has("avx512_bf16")
    channels = min(conv.in_channels, conv.out_channels)
    return channels >= 64 if not twice_as_fast else channels >= 256 and not upsampling


def _cpu_has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


class WinogradConv:
    """A 3x3 convolution as F(4x4, 3x3)."""

    up, down, tile = 1, 1, 4

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.filters = transform_filters(conv.weight, FILTER_4, work)  # (36, in, out)
        self.dtype = self.filters.dtype
        self.bias = conv.bias.to(self.dtype)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, r, s, o = x.shape[0], (x.shape[1] - 2) // 4, (x.shape[2] - 2) // 4, self.filters.shape[2]
        products = work.get("products", (6, 6, b, r, s, o), self.dtype)
        torch.bmm(input_tiles(x, work), self.filters, out=products.view(36, -1, o))

        half = work.get("pixels", (4, 6, b, r, s, o), self.dtype)
        _outputs(products.unbind(), half.unbind(), work)
        y = work.get("half", (b, r, 4, s, 4, o), self.dtype)
        _outputs(half.unbind(1), y.permute(4, 2, 0, 1, 3, 5).unbind(), work)
        return y.view(b, 4 * r, 4 * s, o).add_(self.bias)


class WinogradUpsample:
    """A 3x3 convolution of the nearest-neighbour upsampling by two, from the pixels themselves."""

    up, down, tile = 2, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.filters = transform_filters(conv.weight, FILTER_UP, work)  # (9, in, out)
        self.dtype = self.filters.dtype
        self.bias = conv.bias.to(self.dtype)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, r, s, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
        o = self.filters.shape[2]
        steps = work.get("half", (b, r + 1, s + 2, c), self.dtype)  # each pixel less the one below
        torch.sub(x[:, :-1], x[:, 1:], out=steps)
        pixels = work.get("pixels", (3, 3, b, r, s, c), self.dtype)
        for of_row, rows in zip(pixels.unbind(), (steps[:, :-1], x[:, 1:-1], steps[:, 1:]), strict=True):
            left, middle, right = rows.unfold(2, s, 1).permute(2, 0, 1, 4, 3).unbind()
            first, second, third = of_row.unbind()
            torch.sub(left, middle, out=first)
            second.copy_(middle)
            torch.sub(middle, right, out=third)

        products = work.get("products", (3, 3, b, r, s, o), self.dtype)
        torch.bmm(pixels.view(9, -1, c), self.filters, out=products.view(9, -1, o))

        y = work.get("half", (b, r, 2, s, 2, o), self.dtype)
        half = work.get("pixels", (2, 3, b, r, s, o), self.dtype)
        for m, z in ((products, half), (half.transpose(0, 1), y.permute(4, 2, 0, 1, 3, 5))):
            (first, second, third), (upper, lower) = m.unbind(), z.unbind()
            torch.add(first, second, out=upper)
            torch.sub(second, third, out=lower)
        return y.view(b, 2 * r, 2 * s, o).add_(self.bias)


def input_tiles(x: Tensor, work: Workspace) -> Tensor:
    """B^T d B of each tile d of a window: (36, tiles, channels)."""
    b, height, width, c = x.shape
    r, s = (height - 2) // 4, (width - 2) // 4
    half = work.get("half", (6, b, r, width, c), x.dtype)  # rows transformed, columns not yet
    _inputs(x.unfold(1, 6, 4).unbind(-1), half.unbind(), work)
    pixels = work.get("pixels", (6, 6, b, r, s, c), x.dtype)
    _inputs(half.unfold(3, 6, 4).unbind(-1), pixels.unbind(1), work)
    return pixels.view(36, -1, c)


def output_gradient_tiles(y: Tensor, work: Workspace) -> Tensor:
    """A y A^T of each tile y of the gradient in a result, (B, rows, columns, channels): (36, tiles, channels)."""
    b, height, width, c = y.shape
    half = work.get("products", (6, b, height // 4, width, c), y.dtype)
    _outputs_adjoint(y.unfold(1, 4, 4).unbind(-1), half.unbind(), work)
    tiles = work.get("gradients", (6, 6, b, height // 4, width // 4, c), y.dtype)
    _outputs_adjoint(half.unfold(3, 4, 4).unbind(-1), tiles.unbind(1), work)
    return tiles.view(36, -1, c)


def _inputs(d: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """B^T d along one side: six slices -> the six of `out`. The pairs +-p share d4 - q^2 d2 and d3 - q^2 d1."""
    torch.add(d[4], d[0], alpha=A * A * B * B, out=out[0]).sub_(d[2], alpha=A * A + B * B)
    odd = work.get("odd", out[0].shape, out[0].dtype)
    for k, p, q in ((1, A, B), (3, B, A)):
        torch.sub(d[3], d[1], alpha=q * q, out=odd)
        even = torch.sub(d[4], d[2], alpha=q * q, out=out[k + 1])
        torch.add(even, odd, alpha=p, out=out[k])
        even.sub_(odd, alpha=p)
    torch.add(d[5], d[1], alpha=A * A * B * B, out=out[5]).sub_(d[3], alpha=A * A + B * B)


def _outputs(m: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """A^T m along one side: the six of `m`, which it overwrites -> the four of `out`."""
    sum_a = torch.add(m[1], m[2], out=work.get("odd", m[0].shape, m[0].dtype))
    difference_a = m[1].sub_(m[2])
    sum_b = torch.add(m[3], m[4], out=m[2])
    difference_b = m[3].sub_(m[4])
    torch.add(m[0], sum_a, alpha=1 / A, out=out[0]).add_(sum_b, alpha=1 / B)
    torch.add(difference_a, difference_b, out=out[1])
    torch.mul(sum_a, A, out=out[2]).add_(sum_b, alpha=B)
    torch.add(m[5], difference_a, alpha=A * A, out=out[3]).add_(difference_b, alpha=B * B)


def _outputs_adjoint(y: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """A y along one side: four slices -> the six of `out`, what `_outputs` makes of gradients."""
    out[0].copy_(y[0])
    even = work.get("odd", y[0].shape, y[0].dtype)
    for k, p in ((1, A), (3, B)):
        torch.mul(y[0], 1 / p, out=even).add_(y[2], alpha=p)
        odd = torch.add(y[1], y[3], alpha=p * p, out=out[k + 1])
        torch.add(even, odd, out=out[k])
        torch.sub(even, odd, out=odd)
    out[5].copy_(y[3])


def transform_filters(weight: Tensor, matrix: Tensor, work: Workspace) -> Tensor:
    """(out, in, 3, 3) -> G g G^T for every pair of channels, (n*n, in, out); valid until the next is made."""
    o, i = weight.shape[:2]
    weight = weight.reshape(o * i, 9).to(torch.promote_types(weight.dtype, torch.float32))
    both_sides = torch.kron(matrix, matrix).to(weight.dtype)  # (n*n, 9)
    filters = work.get("filters", (len(both_sides), o * i), weight.dtype)
    torch.mm(both_sides, weight.t(), out=filters)
    return filters.view(-1, o, i).transpose(1, 2)


def _filter_4() -> Tensor:
    """G of F(4, 3), the rows of +-A and +-B times A and B, which `_outputs` undoes."""
    points = torch.tensor([0.0, A, -A, B, -B], dtype=torch.float64)
    differences = points[:, None] - points + torch.eye(5, dtype=torch.float64)
    scale = torch.tensor([1.0, A, A, B, B], dtype=torch.float64) / differences.prod(dim=1)
    finite = scale[:, None] * points[:, None] ** torch.arange(3)
    return torch.cat([finite, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])


with torch.device("cpu"):  # whatever the default is when this is imported
    FILTER_4 = _filter_4()
    FILTER_UP = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
