"""The network's convolutions on padded windows of an activation, by torch's own convolution.

A kernel, here and in `winograd`, is called as `kernel(window, work)` and returns what a convolution makes of the
window, in memory that may be written to and that the next call may use again. Tensors are (B, rows, columns,
channels); for a result of r rows and s columns

- a convolution reads a window of r + 2 rows and s + 2 columns,
- an upsampling one, whose result is `up` = 2 times larger, r/2 + 2 and s/2 + 2,
- a downsampling one, whose result is `down` = 2 times smaller, 2r + 1 and 2s + 1,
  since it reads nothing `before` its pixels.

The window is of the kernel's `dtype` and its inside a multiple of `tile`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import Workspace


class DirectConv:
    up, down, tile, before = 1, 1, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        self.weight, self.bias, self.stride = laid_out(conv.weight), conv.bias, conv.stride
        self.dtype = conv.weight.dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, self.stride)
        return y.permute(0, 2, 3, 1).contiguous()  # which it is, unless the library thought otherwise


class DirectDownsample(DirectConv):
    """Stride 2, with zeros at the right and bottom only."""

    up, down, tile, before = 1, 2, 1, 0


class DirectUpsample:
    """A convolution of the nearest-neighbour upsampling by two, as four 2x2 ones of the pixels themselves.

    An output row sees two rows of pixels, one of them twice: its kernel is that with two of the three rows added.
    """

    up, down, tile, before = 2, 1, 1, 1

    def __init__(self, conv: nn.Conv2d, work: Workspace):
        w = conv.weight.to(torch.promote_types(conv.weight.dtype, torch.float32))
        for side in (-1, -2):
            a, b, c = w.split(1, dim=side)
            w = torch.stack([torch.cat([a, b + c], dim=side), torch.cat([a + b, c], dim=side)])
        w = w.flatten(1, 2).to(conv.weight.dtype)  # (lower, right * out, in, 2, 2)
        self.weights = [laid_out(one) for one in w]
        self.bias, self.dtype = conv.bias.repeat(2), conv.weight.dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        b, r, s = x.shape[0], x.shape[1] - 2, x.shape[2] - 2
        out = x.new_empty((b, r, 2, s, 2, len(self.bias) // 2))
        for lower, weight in enumerate(self.weights):
            rows = x[:, lower : lower + r + 1].permute(0, 3, 1, 2)
            y = F.conv2d(rows, weight, self.bias).permute(0, 2, 3, 1).unflatten(3, (2, -1))
            for right in (0, 1):  # one column more than pixels: a kernel begins before its pixel or on it
                out[:, :, lower, :, right] = y[:, :, right : right + s, right]
        return out.view(b, 2 * r, 2 * s, -1)


class CalledConv:
    """Call the layer itself, for one that is more than its weights (an adapter), and cut off what it padded.

    `dtype`: of what it gets and returns.
    """

    up, down, tile, before = 1, 1, 1, 1

    def __init__(self, conv: nn.Module, dtype: torch.dtype):
        self.conv, self.dtype = conv, dtype

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        return self.called(x.permute(0, 3, 1, 2), cut=1)

    def called(self, x: Tensor, cut: int) -> Tensor:
        y = self.conv(x)
        y = y[:, :, cut : y.shape[2] - cut, cut : y.shape[3] - cut]
        return y.permute(0, 2, 3, 1).to(self.dtype).contiguous()


class CalledDownsample(CalledConv):
    """Call a downsampling layer, which pads nothing."""

    up, down, tile, before = 1, 2, 1, 0

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        return self.called(x.permute(0, 3, 1, 2), cut=0)


class CalledUpsample(CalledConv):
    up, down, tile, before = 2, 1, 1, 1

    def __call__(self, x: Tensor, work: Workspace) -> Tensor:
        larger = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        return self.called(larger, cut=2)


def laid_out(weight: Tensor) -> Tensor:
    """The weight in channels_last, so that no call has to convert it; the weight itself if it is already."""
    return weight.contiguous(memory_format=torch.channels_last)
