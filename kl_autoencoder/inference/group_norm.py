"""GroupNorm in pieces: statistics merged over pieces, and normalisation followed by SiLU of any part.

Tensors are (B, rows, columns, channels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import triton_group_norm
from .memory import Workspace


class Statistics:
    """Mean and variance of the channels of disjoint pieces, and from them those of GroupNorm's groups.

    Merged as in Chan, Golub & LeVeque 1983: M2 = sum M2_i + sum n_i (mean_i - mean)^2, where M2 is the sum of
    squared deviations. Pieces are measured in float32 or better and merged in float64, in the order of their
    numbers, so that the result does not depend on which piece was measured first.
    """

    def __init__(self):
        # number of a piece -> its pixels (P,), mean and variance (P, B, C)
        self.pieces: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add_and_measure(self, number: int, y: Tensor, residual: Tensor | None, work: Workspace) -> None:
        """Add `residual` (if any) to y, in place, then measure y (B, rows, columns, C) as piece `number`."""
        if triton_group_norm.usable(y) and y.is_contiguous():
            self.pieces[number] = triton_group_norm.measure(y, residual)
            return
        if residual is not None:
            same = residual.dtype == y.dtype
            y.add_(residual if same else work.get("pixels", y.shape, y.dtype).copy_(residual))
        moments = [channel_moments(image, work) for image in y.split(1)]
        mean, variance = (torch.stack(m)[None] for m in zip(*moments, strict=True))
        pixels = torch.full((1,), y.shape[1] * y.shape[2], device=y.device)
        self.pieces[number] = (pixels, mean, variance)

    def merge(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each image's groups: (B, groups, 1) each, float64."""
        pieces = zip(*(self.pieces[k] for k in sorted(self.pieces)), strict=True)
        n, means, variances = (torch.cat(values).double() for values in pieces)
        n = n.view(-1, 1, 1, 1)
        means, variances = (v.unflatten(2, (groups, -1)) for v in (means, variances))  # (P, B, groups, c)
        total = n.sum() * means.shape[3]
        mean = (n * means).sum(dim=(0, 3), keepdim=True) / total
        m2 = (n * (variances + (means - mean).square())).sum(dim=(0, 3), keepdim=True)
        return mean[0], m2[0] / total


class Normalization:
    """GroupNorm with known statistics, then SiLU (unless `silu` is False).

    `normalization(x, out, work)` reads a piece x and writes the result into `out`; both (B, rows, columns, C).
    """

    def __init__(self, norm: nn.GroupNorm, statistics: Statistics, silu: bool = True):
        mean, variance = statistics.merge(norm.num_groups)
        scale = torch.rsqrt(variance + norm.eps) * norm.weight.double().view(norm.num_groups, -1)
        shift = norm.bias.double().view(norm.num_groups, -1) - mean * scale
        self.dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        self.scale, self.shift = (v.flatten(1).to(self.dtype) for v in (scale, shift))  # (B, C)
        self.silu = silu

    def __call__(self, x: Tensor, out: Tensor, work: Workspace) -> None:
        if triton_group_norm.usable(x):
            return triton_group_norm.normalize(x, self.scale, self.shift, self.silu, out)
        wide = x if x.dtype == self.dtype else work.get("pixels", x.shape, self.dtype).copy_(x)
        y = out if out.dtype == self.dtype else wide
        torch.addcmul(self.shift[:, None, None], wide, self.scale[:, None, None], out=y)
        if self.silu:
            F.silu(y, inplace=True)
        if y is not out:
            out.copy_(y)


def copy(x: Tensor, out: Tensor, work: Workspace) -> None:
    """Copy x into `out`: in place of a `Normalization`, for convolutions without one."""
    out.copy_(x)


def channel_moments(image: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Return the mean (C,), float64, and biased variance (C,), of an image (1, rows, columns, C)."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    wide = work.get("pixels", image.shape, dtype)
    # The first pixel is subtracted, or rounding would swamp the variance of flat images, small beside the mean.
    reference = image[:, :1, :1].to(dtype)
    torch.sub(image if image.dtype == dtype else wide.copy_(image), reference, out=wide)
    # Of torch's functions for mean and variance, this one is fast on channels-last tensors.
    mean, variance = torch.batch_norm_update_stats(wide.permute(0, 3, 1, 2), None, None, 0.0)
    return reference.flatten().double() + mean, variance
