"""Convolutions of padded windows of an activation, by torch's own convolution.

The contract of all kernels, here and in `winograd`: `kernel(window, work)` returns the convolution of the window.
The caller may overwrite the result; the next call may reuse its memory. Tensors are (B, rows, columns, channels).
For a result of r rows and s columns, the window has

    kernel          up  down  before   rows      columns
    convolution      1     1       1   r + 2     s + 2
    upsampling       2     1       1   r/2 + 2   s/2 + 2
    downsampling     1     2       0   2r + 1    2s + 1

that is, `before` rows and columns before its inner pixels, and one after them; the result is `up` times larger, or
`down` times smaller, than the inside. The window has the kernel's `dtype`, and the rows and columns of its inside
are multiples of `tile`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import Workspace


class DirectConv:
    """A 3x3 convolution of stride 1."""

    up, down, tile, before = 1, 1, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.weight, self.bias, self.stride = in_channels_last(conv.weight), conv.bias, conv.stride
        self.dtype = conv.weight.dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, self.stride)
        return y.permute(0, 2, 3, 1).contiguous()  # a copy only if torch chose another memory format


class DirectDownsample(DirectConv):
    """A 3x3 convolution of stride 2, zero-padded at the right and bottom only."""

    up, down, tile, before = 1, 2, 1, 0


class DirectUpsample:
    """Nearest-neighbour upsampling by two and a 3x3 convolution, as four 2x2 convolutions of the pixels.

    The three upsampled rows under a 3x3 kernel are copies of two rows of pixels, so two of the kernel's rows can be
    added up; the same holds for columns. The four combinations, for even and odd output rows and columns:

        even output row:  a | b + c        odd output row:  a + b | c        (a, b, c: the kernel's rows)
    """

    up, down, tile, before = 2, 1, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        w = conv.weight.to(torch.promote_types(conv.weight.dtype, torch.float32))
        for side in (-1, -2):
            a, b, c = w.split(1, dim=side)
            w = torch.stack([torch.cat([a, b + c], dim=side), torch.cat([a + b, c], dim=side)])
        w = w.flatten(1, 2).to(conv.weight.dtype)  # (lower, right * out, in, 2, 2)
        self.weights = [in_channels_last(one) for one in w]
        self.bias, self.dtype = conv.bias.repeat(2), conv.weight.dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, r, s = x.shape[0], x.shape[1] - 2, x.shape[2] - 2
        out = x.new_empty((b, r, 2, s, 2, len(self.bias) // 2))
        for lower, weight in enumerate(self.weights):
            rows = x[:, lower : lower + r + 1].permute(0, 3, 1, 2)
            y = F.conv2d(rows, weight, self.bias).permute(0, 2, 3, 1).unflatten(3, (2, -1))
            # y has s + 1 columns: even output columns take the first s of them, odd ones the last s.
            for right in (0, 1):
                out[:, :, lower, :, right] = y[:, :, right : right + s, right]
        return out.view(b, 2 * r, 2 * s, -1)


class CalledConv:
    """A convolution computed by calling its module, for layers that do more than their weights say (adapters).

    The module pads the window once more; the extra border of the result is cut off. `dtype`: of window and result.
    """

    up, down, tile, before = 1, 1, 1, 1

    def __init__(self, conv: nn.Module, dtype: torch.dtype):
        self.conv, self.dtype = conv, dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        return self.called(x.permute(0, 3, 1, 2), cut=1)

    def called(self, x: Tensor, cut: int) -> Tensor:
        """(B, C, rows, columns) -> the module's result without `cut` pixels at each side, (B, r, s, C)."""
        y = self.conv(x)
        y = y[:, :, cut : y.shape[2] - cut, cut : y.shape[3] - cut]
        return y.permute(0, 2, 3, 1).to(self.dtype).contiguous()


class CalledDownsample(CalledConv):
    """A downsampling convolution computed by calling its module, which pads nothing."""

    up, down, tile, before = 1, 2, 1, 0

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        return self.called(x.permute(0, 3, 1, 2), cut=0)


class CalledUpsample(CalledConv):
    """Nearest-neighbour upsampling by two and a convolution computed by calling its module."""

    up, down, tile, before = 2, 1, 1, 1

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        larger = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        return self.called(larger, cut=2)


def in_channels_last(weight: Tensor) -> Tensor:
    """Return the weight in channels_last format, so that calls need not convert it; no copy if it is already."""
    return weight.contiguous(memory_format=torch.channels_last)
