"""3x3 convolutions with fewer multiplications (Winograd's minimal filtering), in float32 or better, on a CPU.

F(4x4, 3x3) of Lavin & Gray 2016, "Fast algorithms for convolutional neural networks": a tile of 4x4 outputs takes
36 products for each pair of channels, instead of 144. Interpolation points are 0, +-11/16, +-3/2; their rounding
error is less than half that of the paper's (0, +-1, +-2).

Error in float32 against float64, relative rms, on a Zen 5:

    one layer, 64 to 512 channels     here 6.0e-7 to 1.4e-6; oneDNN's direct convolution 2.2e-7 in NCHW,
                                      2.5e-7 to 1.2e-6 in channels_last
    Stable Diffusion's decoder        here 6.3e-6; 4.4 times diffusers' in NCHW, 0.96 times that in channels_last
    Stable Diffusion's encoder        here 4.2e-6; 4.8 times diffusers' in NCHW, 1.23 times that in channels_last
    with MKL's products instead       layer 5.8e-7 to 8.6e-7, decoder 4.1e-6, encoder 3.2e-6 (see `products_with`)

After nearest-neighbour upsampling by two, 2x2 outputs take 9 products instead of 36: 7 of the 16 products of
F(2x2, 3x3) multiply a difference of equal pixels, which is 0. Error of a layer 2.2e-7 to 5.6e-7, 1.0 to 2.4 times
that of the direct convolution in NCHW.

The kernels follow the contract in `conv`. They consist of additions of slices and of the matrix products of
`products_with`.
"""

import platform
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .memory import Workspace

A, B = 11 / 16, 3 / 2  # the points of F(4x4, 3x3) are 0, A, -A, B, -B and infinity
# Input channels times output channels; above, rearranging the filters takes longer than it saves.
MOST_IN_GROUPS = 256 * 256


def is_profitable(
    conv: nn.Conv2d, device: torch.device, dtype: torch.dtype, upsampling: bool = False
) -> bool:
    """Whether Winograd's products in float32 are faster on this processor than a direct convolution in `dtype`.

    torch's direct convolution in bfloat16 has, compared with float32, twice the rate of products with AVX512-BF16
    (on a Zen 4 as fast as Winograd at 128 channels, slower at 256), many times the rate with AMX, and a lower rate
    with neither.
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
    """A 3x3 convolution of stride 1, as F(4x4, 3x3)."""

    up, down, tile, before = 1, 1, 4, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.products = products_with(transform_filters(conv.weight, FILTER_4, work))
        self.dtype = self.products.dtype
        self.bias = conv.bias.to(self.dtype)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, rows, columns = x.shape[0], (x.shape[1] - 2) // 4, (x.shape[2] - 2) // 4
        y = work.get("result", (b, 4 * rows, 4 * columns, len(self.bias)), self.dtype)
        step = max(self.products.tiles_a_thread * max(2, torch.get_num_threads()) // (b * columns), 1)
        for first in range(0, rows, step):
            top, bottom = 4 * first, 4 * min(first + step, rows)
            self.convolve(x[:, top : bottom + 2], y[:, top:bottom], work)
        return y

    def convolve(self, x: Tensor, y: Tensor, work: Workspace) -> None:
        """Write the convolution of the window x, a few rows of tiles, into y (B, rows, columns, channels)."""
        pixels = self.products.tiles(tiles_shape(x), work)
        input_tiles(x, pixels, work)
        products = self.products(pixels, work)
        b, r, s, o = products.shape[2:]
        half = work.get("pixels", (4, 6, b, r, s, o), self.dtype)
        _outputs(products.unbind(), half.unbind(), work)
        tiles = y.unflatten(2, (s, 4)).unflatten(1, (r, 4))  # (B, r, 4, s, 4, out)
        _outputs(half.unbind(1), tiles.permute(4, 2, 0, 1, 3, 5).unbind(), work)
        y.add_(self.bias)


class WinogradUpsample:
    """Nearest-neighbour upsampling by two and a 3x3 convolution, computed without the upsampled activation."""

    up, down, tile, before = 2, 1, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.products = products_with(transform_filters(conv.weight, FILTER_UP, work))
        self.dtype = self.products.dtype
        self.bias = conv.bias.to(self.dtype)

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, r, s, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
        steps = work.get("half", (b, r + 1, s + 2, c), self.dtype)  # each pixel minus the one below it
        torch.sub(x[:, :-1], x[:, 1:], out=steps)
        pixels = self.products.tiles((3, 3, b, r, s, c), work)
        for of_row, rows in zip(pixels.unbind(), (steps[:, :-1], x[:, 1:-1], steps[:, 1:]), strict=True):
            left, middle, right = rows.unfold(2, s, 1).permute(2, 0, 1, 4, 3).unbind()
            first, second, third = of_row.unbind()
            torch.sub(left, middle, out=first)
            second.copy_(middle)
            torch.sub(middle, right, out=third)

        products = self.products(pixels, work)
        o = products.shape[5]
        y = work.get("half", (b, r, 2, s, 2, o), self.dtype)
        half = work.get("pixels", (2, 3, b, r, s, o), self.dtype)
        for m, z in ((products, half), (half.transpose(0, 1), y.permute(4, 2, 0, 1, 3, 5))):
            (first, second, third), (upper, lower) = m.unbind(), z.unbind()
            torch.add(first, second, out=upper)
            torch.sub(second, third, out=lower)
        return y.view(b, 2 * r, 2 * s, o).add_(self.bias)


# ---------------------------------------------------------------- products


def products_with(filters: Tensor) -> "BatchedProducts":
    """Return the fastest way to compute x[k] @ filters[k].T at every position k of a tile; filters (n*n, out, in).

    torch multiplies matrices by MKL, which does not use AVX-512 on processors that are not Intel's. oneDNN, with
    which torch computes convolutions, does: for 64 to 512 channels in float32 on one thread of a Zen 5, MKL reaches
    80 to 110 GFLOP/s, and oneDNN 150 to 225, including the copies before and after the products. So on such a
    processor

    - up to 256 channels are computed as one convolution in n*n groups (its filters are rearranged for oneDNN
      first);
    - more channels as n*n linear layers, whose filters are used as they are: at 512 channels rearranging takes 50
      ms and saves 6 of 52 ms for 256 tiles.

    The products take and return tensors (n, n, B, rows, columns, channels), whose memory layout they choose.
    """
    if filters.dtype != torch.float32 or not is_onednn_faster():
        return BatchedProducts(filters)
    return (GroupedProducts if filters[0].numel() <= MOST_IN_GROUPS else SeparateProducts)(filters)


@cache
def is_onednn_faster() -> bool:
    """Whether this is a processor of AMD with AVX-512, and torch has both MKL and oneDNN."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name") or platform.processor()
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and "AMD" in name and torch.backends.cpu.get_cpu_capability() == "AVX512"


class BatchedProducts:
    """All products as one batched matrix product of torch."""

    # Tiles multiplied at once, for each thread: fewer are slower, more only take more scratch memory.
    tiles_a_thread = 128

    def __init__(self, filters: Tensor):
        self.filters, self.dtype, self.out_channels = filters, filters.dtype, filters.shape[1]

    def tiles(self, shape: tuple[int, ...], work: Workspace) -> Tensor:
        """Return a tensor of this shape, to be filled with the input tiles."""
        return work.get("pixels", shape, self.dtype)

    def __call__(self, tiles: Tensor, work: Workspace) -> Tensor:
        """Return the products of `tiles` (from `tiles()`). The caller may overwrite them; the next call does."""
        products = work.get("products", (*tiles.shape[:-1], self.out_channels), self.dtype)
        positions = tiles.flatten(0, 1).flatten(1, -2)
        self.multiply(positions, products.view(len(positions), -1, self.out_channels))
        return products

    def multiply(self, positions: Tensor, out: Tensor) -> None:
        torch.bmm(positions, self.filters.mT, out=out)


class SeparateProducts(BatchedProducts):
    """Each product as a linear layer of oneDNN."""

    def multiply(self, positions: Tensor, out: Tensor) -> None:
        linear = torch.ops.mkldnn._linear_pointwise
        for x, one, y in zip(positions.unbind(), self.filters.unbind(), out.unbind(), strict=True):
            y.copy_(linear(x, one, None, "none", [], ""))


class GroupedProducts(BatchedProducts):
    """All products as one grouped 1x1 convolution of oneDNN: each position of a tile is a group of channels."""

    tiles_a_thread = 64

    def __init__(self, filters: Tensor):
        super().__init__(filters)
        n, out, into = filters.shape
        weight = filters.reshape(n * out, into, 1, 1).to_mkldnn()
        size = (1, n * into, 1, 2 * self.tiles_a_thread)
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, groups=n, input_size=size)

    def tiles(self, shape: tuple[int, ...], work: Workspace) -> Tensor:
        n, _, b, rows, columns, channels = shape
        return work.get("pixels", (b, rows, columns, n, n, channels), self.dtype).permute(3, 4, 0, 1, 2, 5)

    def __call__(self, tiles: Tensor, work: Workspace) -> Tensor:
        n, _, b, rows, columns, _ = tiles.shape
        x = tiles.permute(2, 3, 4, 0, 1, 5).flatten(3).permute(0, 3, 1, 2)
        products = work.get("products", (b, rows, columns, n, n, self.out_channels), self.dtype)
        y = products.zero_().flatten(3).permute(0, 3, 1, 2)
        # The variant that adds its result onto y (zeros): others would allocate memory for it.
        add = ("add", 1, None, [], None)
        torch.ops.mkldnn._convolution_pointwise_(y, x, self.weight, None, (0, 0), (1, 1), (1, 1), n * n, *add)
        return products.permute(3, 4, 0, 1, 2, 5)


# ---------------------------------------------------------------- transforms


def tiles_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of the tiles of a window x (B, rows, columns, C): (6, 6, B, rows, columns of tiles, C)."""
    b, height, width, c = x.shape
    return 6, 6, b, (height - 2) // 4, (width - 2) // 4, c


def input_tiles(x: Tensor, pixels: Tensor, work: Workspace) -> None:
    """Write B^T d B for each 6x6 tile d of a window x into `pixels`, which has the shape `tiles_shape(x)`."""
    _, n, b, r, _, c = pixels.shape
    half = work.get("half", (n, b, r, x.shape[2], c), x.dtype)  # rows are transformed, columns not yet
    _inputs(x.unfold(1, 6, 4).unbind(-1), half.unbind(), work)
    _inputs(half.unfold(3, 6, 4).unbind(-1), pixels.unbind(1), work)


def output_gradient_tiles(y: Tensor, work: Workspace) -> Tensor:
    """Gradient y of a result, (B, rows, columns, C) -> A y A^T for each 4x4 tile of it, (36, tiles, C)."""
    b, height, width, c = y.shape
    half = work.get("products", (6, b, height // 4, width, c), y.dtype)
    _outputs_adjoint(y.unfold(1, 4, 4).unbind(-1), half.unbind(), work)
    tiles = work.get("gradients", (6, 6, b, height // 4, width // 4, c), y.dtype)
    _outputs_adjoint(half.unfold(3, 4, 4).unbind(-1), tiles.unbind(1), work)
    return tiles.view(36, -1, c)


def _inputs(d: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """B^T d along one side: six slices -> six of `out`. Points +p and -p share d4 - q^2 d2 and d3 - q^2 d1."""
    torch.add(d[4], d[0], alpha=A * A * B * B, out=out[0]).sub_(d[2], alpha=A * A + B * B)
    odd = work.get("odd", out[0].shape, out[0].dtype)
    for k, p, q in ((1, A, B), (3, B, A)):
        torch.sub(d[3], d[1], alpha=q * q, out=odd)
        even = torch.sub(d[4], d[2], alpha=q * q, out=out[k + 1])
        torch.add(even, odd, alpha=p, out=out[k])
        even.sub_(odd, alpha=p)
    torch.add(d[5], d[1], alpha=A * A * B * B, out=out[5]).sub_(d[3], alpha=A * A + B * B)


def _outputs(m: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """A^T m along one side: six slices of `m`, which are overwritten -> four of `out`."""
    sum_a = torch.add(m[1], m[2], out=work.get("odd", m[0].shape, m[0].dtype))
    difference_a = m[1].sub_(m[2])
    sum_b = torch.add(m[3], m[4], out=m[2])
    difference_b = m[3].sub_(m[4])
    torch.add(m[0], sum_a, alpha=1 / A, out=out[0]).add_(sum_b, alpha=1 / B)
    torch.add(difference_a, difference_b, out=out[1])
    torch.mul(sum_a, A, out=out[2]).add_(sum_b, alpha=B)
    torch.add(m[5], difference_a, alpha=A * A, out=out[3]).add_(difference_b, alpha=B * B)


def _outputs_adjoint(y: Sequence[Tensor], out: Sequence[Tensor], work: Workspace) -> None:
    """A y along one side: four slices -> six of `out`; the adjoint of `_outputs`."""
    out[0].copy_(y[0])
    even = work.get("odd", y[0].shape, y[0].dtype)
    for k, p in ((1, A), (3, B)):
        torch.mul(y[0], 1 / p, out=even).add_(y[2], alpha=p)
        odd = torch.add(y[1], y[3], alpha=p * p, out=out[k + 1])
        torch.add(even, odd, out=out[k])
        torch.sub(even, odd, out=odd)
    out[5].copy_(y[3])


def transform_filters(weight: Tensor, matrix: Tensor, work: Workspace) -> Tensor:
    """Filters g (out, in, 3, 3) -> G g G^T for every pair of channels, (n*n, out, in); G is `matrix`, (n, 3).

    The result is in `work`: the next call overwrites it.
    """
    o, i = weight.shape[:2]
    weight = weight.reshape(o * i, 9).to(torch.promote_types(weight.dtype, torch.float32))
    both_sides = torch.kron(matrix, matrix).to(weight.dtype)  # (n*n, 9)
    filters = work.get("filters", (len(both_sides), o * i), weight.dtype)
    torch.mm(both_sides, weight.t(), out=filters)
    return filters.view(-1, o, i)


def _filter_4() -> Tensor:
    """Return G of F(4, 3), (6, 3).

    The rows of points +-A and +-B are multiplied by A and B; `_outputs` undoes it.
    """
    points = torch.tensor([0.0, A, -A, B, -B], dtype=torch.float64)
    differences = points[:, None] - points + torch.eye(5, dtype=torch.float64)
    scale = torch.tensor([1.0, A, A, B, B], dtype=torch.float64) / differences.prod(dim=1)
    finite = scale[:, None] * points[:, None] ** torch.arange(3)
    return torch.cat([finite, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])


with torch.device("cpu"):  # whatever the default device is at import
    FILTER_4 = _filter_4()
    FILTER_UP = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
