"""Choose how a layer is computed on pieces: by the fastest kernel from its weights, or by calling the module."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import Tensor, nn

from . import winograd
from .conv import (
    CalledConv,
    CalledDownsample,
    CalledUpsample,
    DirectConv,
    DirectDownsample,
    DirectUpsample,
)
from .memory import Workspace
from .module_kinds import is_plain


class Projection(NamedTuple):
    """The query, key or value part of a fused projection: weight (C, C) and bias (C,)."""

    weight: Tensor
    bias: Tensor


class Layers:
    """Choose kernels for activations on one device and of one dtype.

    Args:
        call_all: call every convolution and linear layer instead of computing its result from its weights, as
            autocast requires. Layers that are not plain (see `module_kinds`) are called in any case.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, call_all: bool = False):
        self.device, self.dtype, self.call_all = device, dtype, call_all

    def conv(self, conv: nn.Module, work: Workspace):
        """Return the kernel for a 3x3 convolution of stride 1."""
        if self.is_called(conv):
            return CalledConv(conv, self.dtype)
        fewer_products = winograd.is_profitable(conv, self.device, self.dtype)
        return (winograd.WinogradConv if fewer_products else DirectConv)(conv, work)

    def upsample(self, conv: nn.Module, work: Workspace):
        """Return the kernel for nearest-neighbour upsampling by two followed by a 3x3 convolution."""
        if self.is_called(conv):
            return CalledUpsample(conv, self.dtype)
        fewer_products = winograd.is_profitable(conv, self.device, self.dtype, upsampling=True)
        return (winograd.WinogradUpsample if fewer_products else DirectUpsample)(conv, work)

    def downsample(self, conv: nn.Module, work: Workspace):
        """Return the kernel for a 3x3 convolution of stride 2."""
        return CalledDownsample(conv, self.dtype) if self.is_called(conv) else DirectDownsample(conv, work)

    def pointwise(self, conv: nn.Module, x: Tensor, work: Workspace) -> Tensor:
        """1x1 convolution, as a matrix product: (B, rows, columns, in) -> (B, rows, columns, out)."""
        if self.is_called(conv):
            return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        pixels = x if x.is_contiguous() else work.get("window", x.shape, x.dtype).copy_(x)
        pixels = pixels.flatten(0, 2)
        y = work.get("half", (len(pixels), conv.out_channels), x.dtype)
        torch.addmm(conv.bias, pixels, conv.weight.flatten(1).t(), out=y)
        return y.view(*x.shape[:3], -1)

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Linear layer, or `Projection`: (..., in) -> (..., out)."""
        return layer(x).to(self.dtype) if self.is_called(layer) else F.linear(x, layer.weight, layer.bias)

    def is_called(self, layer: nn.Module | Projection) -> bool:
        """Whether the module itself is called, rather than computed from its weights."""
        return isinstance(layer, nn.Module) and (self.call_all or not is_plain(layer))


def projections(block: nn.Module) -> list[nn.Module | Projection]:
    """Return the query, key and value layers of an attention block, or the three parts of its fused projection."""
    if not isinstance(block.processor, FusedAttnProcessor2_0):
        return [block.to_q, block.to_k, block.to_v]
    parts = zip(block.to_qkv.weight.chunk(3), block.to_qkv.bias.chunk(3), strict=True)
    return [Projection(weight, bias) for weight, bias in parts]


def out_channels(conv: nn.Module) -> int:
    """Return the output channels of a convolution, or of an adapter around one."""
    return conv.weight.shape[0]
