"""The weights that a new network starts from: nearly linear, or already reconstructing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.models.config import decoder_block_out_channels
from kl_autoencoder.networks.convolutional import AttentionBlock, ResnetBlock

# Red, green, blue in [-1, 1] -> brightness, blue-yellow and green-magenta, each of about unit deviation over
# photographs: the principal components of the mean colours of 8x8 blocks, rounded.
COLOURS = torch.tensor([[0.65, 0.65, 0.65], [2.7, 0.0, -2.7], [-3.4, 6.8, -3.4]])
LOG_VARIANCE = -6.0  # of the posterior: a deviation of 0.05 beside latents of deviation 1
STEADY = 8.0  # deviation of a steady group, beside which what the image adds counts little
BRANCH_DEVIATION = 1 / 3  # between the two convolutions of a ResNet block, as torch initialises them


@torch.no_grad()
def damp_residual_branches(vae: KLAutoencoder) -> KLAutoencoder:
    """Starts each residual branch at a tenth of torch's default, so that the network starts nearly linear.

    The idea of Goyal et al. 2017 (section 5.1) and Fixup (Zhang et al. 2019), short of zero so that every weight
    has a gradient from the first step on.
    """
    for block in vae.modules():
        if isinstance(block, (ResnetBlock, AttentionBlock)):
            last = block.conv2 if isinstance(block, ResnetBlock) else block.to_out[0]
            last.weight *= 0.1
            last.bias *= 0.1
    return vae


@torch.no_grad()
def start_as_enlargement(vae: KLAutoencoder) -> KLAutoencoder:
    """Makes a new network average blocks of pixels and enlarge the result bilinearly, by 2 a level.

    The first three latent channels carry the block means of the `COLOURS`; all else starts at random, with no part
    in the result, and learns. Six channels of every level, the carriers, take the colours as c and -c past the
    residual branches, because SiLU(c) - SiLU(-c) = c: the last SiLUs of encoder and decoder, which nothing goes
    around, change nothing then. Nor do the norms before them, which are steady, as are those inside the ResNet
    blocks: what a steady norm does depends little on the image and its size.

    Raises ValueError for a network that has no room for this.
    """
    config, groups, latents = vae.config, vae.config.norm_num_groups, vae.config.latent_channels
    widths, decoder_widths = config.block_out_channels, decoder_block_out_channels(config)
    smallest = min(*widths, *decoder_widths)
    if config.in_channels != 3:
        raise ValueError(f"model.start: enlargement of {config.in_channels} channels; allowed: with 3, RGB")
    if latents < 3 or smallest // groups < 4 or smallest - groups < 6:
        raise ValueError(
            f"model.start: enlargement with block_out_channels={list(widths)}, "
            f"norm_num_groups={groups}, latent_channels={latents}; allowed: 3 latent channels and more, widths "
            "of 4 channels a group and more, with 6 besides one a group"
        )
    encoder, decoder = vae.encoder, vae.decoder
    _carry_colours(encoder, encoder.mid_block.resnets[-1], groups)
    _carry_colours(decoder, decoder.up_blocks[-1].resnets[-1], groups)
    signs = torch.stack([torch.eye(3), -torch.eye(3)], dim=2).flatten(1)  # (3, 6): c+ - c-
    first, last = (_carriers(widths[level], groups) for level in (0, -1))
    _set(encoder.conv_in, first, range(3), signs.T @ COLOURS, _tap(3))
    _set(encoder.conv_out, range(3), last, signs, _tap(3))
    encoder.conv_out.weight[latents:], encoder.conv_out.bias[latents:] = 0, LOG_VARIANCE
    first, last = (_carriers(decoder_widths[level], groups) for level in (0, -1))
    _set(decoder.conv_in, last, range(3), signs.T, _tap(3))
    _set(decoder.conv_out, range(3), first, COLOURS.inverse() @ signs, _tap(3))
    for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):
        channels = range(conv.out_channels)
        _set(conv, channels, channels, torch.eye(len(channels)), _tap(1))
    return vae


def _carry_colours(network: nn.Module, last: ResnetBlock, groups: int) -> None:
    """Nothing between the first and the last convolution changes the carriers but averaging and interpolation."""
    average = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])  # reads rows 2i and 2i+1
    tent = torch.tensor([0.25, 0.5, 0.25])  # after nearest neighbour 1/4, 3/4, 3/4, 1/4: bilinear
    kernels = {"downsamplers": average, "upsamplers": tent.outer(tent), "conv_shortcut": _tap(1)}
    for name, module in network.named_modules():
        for kind, kernel in kernels.items():
            if kind in name and isinstance(module, nn.Conv2d):
                rows, columns = (_carriers(c, groups) for c in (module.out_channels, module.in_channels))
                _set(module, rows, columns, torch.eye(6), kernel)
        if isinstance(module, ResnetBlock):
            carriers = _carriers(module.conv2.out_channels, groups)
            module.conv2.weight[carriers], module.conv2.bias[carriers] = 0, 0
            _make_steady(module.norm2, module.conv1, BRANCH_DEVIATION)
        if isinstance(module, AttentionBlock):
            carriers = _carriers(module.to_out[0].out_features, groups)
            module.to_out[0].weight[carriers], module.to_out[0].bias[carriers] = 0, 0
    _make_steady(network.conv_norm_out, last.conv2, 1.0)


def _make_steady(norm: nn.GroupNorm, conv: nn.Conv2d, deviation: float) -> None:
    """Makes `norm`, whose input `conv` has a part in, a division by `deviation`.

    The last channel of each group becomes a constant C, by the bias of `conv`. The n channels of the group have the
    mean C/n then and the deviation C sqrt(n-1)/n, which is STEADY; a variance v of the others changes that by
    v/128 of itself. The affine map of the norm undoes both.
    """
    n = norm.num_channels // norm.num_groups
    constant = slice(n - 1, None, n)
    conv.weight[constant], conv.bias[constant] = 0, STEADY * n / math.sqrt(n - 1)
    norm.weight.fill_(STEADY / deviation)
    norm.bias.fill_(STEADY / math.sqrt(n - 1) / deviation)
    norm.weight[constant], norm.bias[constant] = 0, 0


def _carriers(width: int, groups: int) -> list[int]:
    """The first six channels that are not the last of their group."""
    n = width // groups
    return [channel for channel in range(width) if channel % n != n - 1][:6]


def _tap(side: int) -> Tensor:
    """A kernel that takes the pixel in the middle."""
    kernel = torch.zeros(side, side)
    kernel[side // 2, side // 2] = 1
    return kernel


def _set(
    conv: nn.Conv2d, rows: Sequence[int], columns: Sequence[int], matrix: Tensor, kernel: Tensor
) -> None:
    """The output channels `rows` become `matrix` times the input channels `columns`, spread by `kernel`."""
    rows, columns = torch.tensor(rows), torch.tensor(columns)
    conv.weight[rows], conv.bias[rows] = 0, 0
    conv.weight[rows[:, None], columns] = matrix[:, :, None, None] * kernel
