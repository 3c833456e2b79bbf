"""The convolutional encoder and decoder of Stable Diffusion's autoencoder, in plain torch.

Modules are named so that parameters have the names of diffusers' AutoencoderKL: its weights load without
conversion. Architecture: Rombach et al. 2022 (latent diffusion), appendix; ResNet blocks as in Ho et al. 2020.
Every tensor is (B, C, H, W), of any memory format and floating type.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import NORM_EPS, AttentionBlock

# Checkpointing that recomputes only what the backward pass needs: of a last convolution the input, not the output.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(SiLU(norm(x))): (B, in, H, W) -> (B, out, H, W)."""
    return conv(F.silu(norm(x)))


def recomputed_norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`norm_silu_conv` that recomputes norm and SiLU in the backward pass instead of keeping their results.

    The results of norm and SiLU are two thirds of the memory of a training step. The convolutions, nearly all of
    its work, are not repeated.
    """
    return (
        recomputed(norm_silu_conv, norm, conv, x)
        if torch.is_grad_enabled()
        else norm_silu_conv(norm, conv, x)
    )


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two, then conv: (B, in, H, W) -> (B, out, 2H, 2W)."""
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResnetBlock(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H, W): norm, SiLU, conv twice, plus the input."""

    norm_silu_conv = staticmethod(norm_silu_conv)  # training may replace it by a function of the same result

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_silu_conv(self.norm1, self.conv1, x)
        h = self.norm_silu_conv(self.norm2, self.conv2, h)
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a 3x3 convolution of stride 2, zero-padded at the right and bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a 3x3 convolution."""

    upsample_conv = staticmethod(upsample_conv)  # may be replaced, as ResnetBlock.norm_silu_conv

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample_conv(self.conv, x)


class Checkpointing(nn.Module):
    """A module that can recompute each of its blocks in the backward pass instead of keeping their activations.

    diffusers' `enable_gradient_checkpointing` sets both attributes, on every module that has the first.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """Return block(x), recomputed in the backward pass if `gradient_checkpointing` is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, x)
        return block(x)


def call_block(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Stage(nn.Module):
    """A sequence of blocks.

    `forward` computes each as `call(block, x)`; with `Checkpointing.call` it is recomputed.
    """

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in the order of execution."""
        raise NotImplementedError

    def forward(self, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = call_block) -> Tensor:
        for block in self.blocks():
            x = call(block, x)
        return x


def resnet_run(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    """Return `layers` ResNet blocks, the first from in_channels to out_channels."""
    widths = [in_channels] + [out_channels] * layers
    return nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))


class DownBlock(Stage):
    """`layers` ResNet blocks, then downsampling by two if `downsample` (all levels but the last)."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = resnet_run(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def blocks(self):
        return [*self.resnets, *self.downsamplers]


class UpBlock(Stage):
    """`layers` ResNet blocks, then upsampling by two if `upsample` (all levels but the last)."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = resnet_run(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def blocks(self):
        return [*self.resnets, *self.upsamplers]


class MidBlock(Stage, Checkpointing):
    """ResNet block, attention (optional), ResNet block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def blocks(self):
        return [self.resnets[0], *self.attentions, self.resnets[1]]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no argument `call`: it has its own
        return super().forward(x, self.call)


# Programs, and diffusers' own tests, look for modules with gradient checkpointing by their class names in
# diffusers.
MidBlock.__name__ = "UNetMidBlock2D"


class Encoder(Checkpointing):
    """Images (B, in_channels, H, W) -> moments (B, 2*latent_channels, H/f, W/f), f = 2 ** (levels - 1).

    The moments are mean and log-variance of the posterior, in this order in the channels. block_out_channels: width
    of each level, highest resolution first. layers_per_block: ResNet blocks of a level.
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        widths = [first, *block_out_channels]
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, layers_per_block, norm_num_groups, downsample=i + 2 < len(widths))
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block = MidBlock(last, norm_num_groups, mid_block_add_attention)
        self.conv_norm_out = group_norm(norm_num_groups, last)
        self.conv_out = nn.Conv2d(last, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, self.call)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(Checkpointing):
    """Latents (B, latent_channels, h, w) -> images (B, out_channels, f*h, f*w), f = 2 ** (levels - 1).

    block_out_channels: width of each level, highest resolution first, as in the encoder. layers_per_block: of the
    encoder; each level of the decoder has one ResNet block more.
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, last, 3, padding=1)
        widths = [last, *reversed(block_out_channels)]
        self.up_blocks = nn.ModuleList(  # one more ResNet block in each level than the encoder has, as in LDM
            UpBlock(a, b, layers_per_block + 1, norm_num_groups, upsample=i + 2 < len(widths))
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block = MidBlock(last, norm_num_groups, mid_block_add_attention)
        self.conv_norm_out = group_norm(norm_num_groups, first)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Latents (B, latent_channels, h, w) -> the input of `conv_out`: (B, first width, f*h, f*w)."""
        x = self.mid_block(self.conv_in(x))
        # `upcast_vae` of pipelines may leave the layers before here in float16 and put those after it in float32
        dtype = self.up_blocks[0].resnets[0].norm1.weight.dtype
        x = x if self.conv_in.weight.dtype == dtype else x.to(dtype)
        for block in self.up_blocks:
            x = block(x, self.call)
        return F.silu(self.conv_norm_out(x))
