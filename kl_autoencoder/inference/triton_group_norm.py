"""Triton kernels for GroupNorm in pieces on channels-last tensors: statistics, and normalisation with SiLU.

torch's GroupNorm is slow on channels_last, and it does not include the residual sum before it, nor the SiLU and the
padding after it. Here `measure` adds the residual while it computes the statistics, and `normalize` writes
SiLU(GroupNorm(x)) into the padded window that the convolution reads: two passes over memory for each convolution.

Tested for equality on a CPU, in Triton's interpreter (TRITON_INTERPRET=1). Its speed is unmeasured: no GPU was to
be had.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton may be missing without a GPU; then nothing here is called
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHANNELS, PIXELS, PIXELS_A_PROGRAM = 64, 32, 2048  # of a tile of `measure`, and pixels of one of its programs
ELEMENTS = 1024  # of a row, for one program of `normalize`


def usable(x: Tensor) -> bool:
    """Whether the kernels here can compute x: on a GPU (or interpreted), not in float64."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


def measure(y: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Measure y (B, rows, columns, C) in P parts: pixels (P,), mean (P, B, C), biased variance (P, B, C), float32.

    residual: (B, rows, columns, C), added to y in place first; None: nothing is added. y must be contiguous.
    """
    b, rows, columns, c = y.shape
    parts = triton.cdiv(rows * columns, PIXELS_A_PROGRAM)
    pixels = torch.empty(parts, device=y.device)
    mean, variance = torch.empty(2, parts, b, c, device=y.device).unbind()
    other = y if residual is None else residual.contiguous()
    grid = (parts, triton.cdiv(c, CHANNELS), b)
    _measure[grid](
        *(y, other, pixels, mean, variance, rows * columns, c),
        *(residual is not None, CHANNELS, PIXELS, PIXELS_A_PROGRAM),
    )
    return pixels, mean, variance


def normalize(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, out: Tensor) -> None:
    """Write SiLU(x * scale + shift) into `out`, without SiLU if `silu` is False.

    x, out: (B, rows, columns, C), may be rows and columns of larger channels-last tensors. scale, shift: (B, C).
    """
    b, rows, columns, c = x.shape
    grid = (triton.cdiv(columns * c, ELEMENTS), rows, b)
    _normalize[grid](
        *(x, scale, shift, out, columns * c, c),
        *(x.stride(0), x.stride(1), out.stride(0), out.stride(1), silu, ELEMENTS),
    )


if triton is not None:

    @triton.jit
    def _measure(
        y, other, pixels, mean, variance, n, c, ADD: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
        SPAN: tl.constexpr,
    ):  # fmt: skip
        part, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
        channel = tl.program_id(1) * CB + tl.arange(0, CB)
        known = channel < c
        stop = min((part + 1) * SPAN, n)
        count = 0.0
        average = tl.zeros([CB], tl.float32)
        m2 = tl.zeros([CB], tl.float32)
        for first in range(part * SPAN, stop, NB):
            pixel = first + tl.arange(0, NB)
            inside = (pixel < stop)[:, None] & known[None, :]
            place = (image * n + pixel)[:, None] * c + channel[None, :]
            v = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
            if ADD:
                v += tl.load(other + place, mask=inside, other=0.0).to(tl.float32)
                tl.store(y + place, v.to(y.dtype.element_ty), mask=inside)
            here = tl.sum((pixel < stop).to(tl.float32), axis=0)
            average_here = tl.sum(v, axis=0) / here
            deviation = tl.where(inside, v - average_here[None, :], 0.0)
            step = average_here - average  # merged as in Chan, Golub & LeVeque 1983
            m2 += tl.sum(deviation * deviation, axis=0) + step * step * (count * here / (count + here))
            average += step * (here / (count + here))
            count += here
        place = (part * tl.num_programs(2) + image) * c + channel
        tl.store(mean + place, average, mask=known)
        tl.store(variance + place, m2 / count, mask=known)
        tl.store(pixels + part, count)

    @triton.jit
    def _normalize(
        x, scale, shift, out, row_length, c, x_image, x_row, out_image, out_row, SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < row_length
        channel = image * c + i % c
        v = tl.load(x + image * x_image + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
        v = v * tl.load(scale + channel, mask=inside, other=0.0)
        v += tl.load(shift + channel, mask=inside, other=0.0)
        if SILU:
            v = v / (1.0 + tl.exp(-v))
        tl.store(out + image * out_image + row * out_row + i, v.to(out.dtype.element_ty), mask=inside)
