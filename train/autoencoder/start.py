"""Initial weights of a network: nearly linear, or making blurred images, or those of one with other latents."""

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
STEADY_DEVIATION = (
    8.0  # deviation that the constant channel gives its group; what the image adds is small beside it
)
# of values between the two convolutions of a ResNet block with torch's initial weights
BRANCH_DEVIATION = 1 / 3


@torch.no_grad()
def damp_residual_branches(vae: KLAutoencoder) -> KLAutoencoder:
    """Scale the last layer of each residual branch by 0.1, in place, so that the network starts nearly linear.

    Goyal et al. 2017 (section 5.1) and Fixup (Zhang et al. 2019) start these branches at 0; a tenth of torch's
    default instead gives every weight a gradient from the first step on. Returns `vae`.
    """
    for block in vae.modules():
        if isinstance(block, (ResnetBlock, AttentionBlock)):
            last = block.conv2 if isinstance(block, ResnetBlock) else block.to_out[0]
            last.weight *= 0.1
            last.bias *= 0.1
    return vae


@torch.no_grad()
def start_as_enlargement(vae: KLAutoencoder) -> KLAutoencoder:
    """Make a new network, in place, average blocks of pixels and enlarge the result bilinearly, by 2 a level.

    The first three latent channels hold the block means of the three `COLOURS`. All other weights start at random;
    they have no part in the result, but learn. How the colours pass through the network:

    - Six channels of each level, the carriers, hold the colours c and -c. Residual branches add nothing to them.
    - The last SiLU of encoder and decoder has no residual path around it; SiLU(c) - SiLU(-c) = c undoes it.
    - The norm before that SiLU is made steady (`_make_steady`): what it does depends little on the image and its
      size. The norms inside of the ResNet blocks are made steady, too.

    Raises ValueError for a network with too few channels for this, or for images that are not RGB. Returns `vae`.
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
    signs = torch.stack([torch.eye(3), -torch.eye(3)], dim=2).flatten(1)  # (3, 6): from the carriers to c
    first, last = (_carriers(widths[level], groups) for level in (0, -1))
    _set_channels(encoder.conv_in, first, range(3), signs.T @ COLOURS, _identity_kernel(3))
    _set_channels(encoder.conv_out, range(3), last, signs, _identity_kernel(3))
    encoder.conv_out.weight[latents:], encoder.conv_out.bias[latents:] = 0, LOG_VARIANCE
    first, last = (_carriers(decoder_widths[level], groups) for level in (0, -1))
    _set_channels(decoder.conv_in, last, range(3), signs.T, _identity_kernel(3))
    _set_channels(decoder.conv_out, range(3), first, COLOURS.inverse() @ signs, _identity_kernel(3))
    for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):
        channels = range(conv.out_channels)
        _set_channels(conv, channels, channels, torch.eye(len(channels)), _identity_kernel(1))
    return vae


@torch.no_grad()
def add_latents(vae: KLAutoencoder, wider: KLAutoencoder) -> KLAutoencoder:
    """Give `wider`, the same network with more latent channels, the weights of `vae`, so that it makes its images.

    The first channels are those of `vae`. The encoder makes the others by random weights (of seed 0), twice as
    large as those of the channels before; the decoder does not read them yet. Returns `wider`.
    """
    old, new = vae.config.latent_channels, wider.config.latent_channels
    _load_all_but_latents(vae, wider)
    means, moments = torch.arange(old), torch.cat([torch.arange(old), new + torch.arange(old)])
    features = torch.arange(vae.encoder.conv_out.in_channels)
    widest = torch.arange(vae.decoder.conv_in.out_channels)
    weight = vae.encoder.conv_out.weight
    if vae.quant_conv is not None:
        nn.init.dirac_(wider.quant_conv.weight)
        _copy_channels(vae.quant_conv, wider.quant_conv, moments, moments)
        weight = torch.einsum("om,mihw->oihw", vae.quant_conv.weight[:, :, 0, 0], weight)
    if vae.post_quant_conv is not None:
        nn.init.dirac_(wider.post_quant_conv.weight)
        _copy_channels(vae.post_quant_conv, wider.post_quant_conv, means, means)
    wider.decoder.conv_in.weight.zero_()
    _copy_channels(vae.decoder.conv_in, wider.decoder.conv_in, widest, means)
    last = wider.encoder.conv_out
    last.weight.zero_()
    _copy_channels(vae.encoder.conv_out, last, moments, features)
    added = torch.randn(new - old, *last.weight.shape[1:], generator=torch.Generator().manual_seed(0))
    last.weight[old:new] = 2 * weight[:old].std() * added.to(weight)
    last.bias[new + old :] = LOG_VARIANCE
    return wider


@torch.no_grad()
def keep_principal_latents(vae: KLAutoencoder, narrower: KLAutoencoder, latents: Tensor) -> KLAutoencoder:
    """Make the latents of `narrower`, the same network with fewer channels, principal components of those of `vae`.

    latents: (N, C), means of the posterior of `vae` at N positions. The components are scaled to one deviation, the
    root mean square of those of `latents`. The decoder gets the projection of the latents onto them, except at the
    border of the image, where a convolution sees zeros. Returns `narrower`.
    """
    old, new = vae.config.latent_channels, narrower.config.latent_channels
    latents = latents.double()
    mean, covariance = latents.mean(0), torch.cov(latents.T)
    variances, axes = torch.linalg.eigh(covariance)  # in rising order
    axes, deviations = axes[:, -new:].flip(1), variances[-new:].flip(0).sqrt()
    scale = covariance.diagonal().mean().sqrt() / deviations
    _load_all_but_latents(vae, narrower)

    to_means, bias = _matrix(vae.quant_conv, 2 * old, slice(old))
    project = scale[:, None] * axes.T  # components = project @ (means - mean)
    last, into = vae.encoder.conv_out, narrower.encoder.conv_out
    into.weight.zero_()
    into.bias.fill_(LOG_VARIANCE)
    into.weight[:new] = torch.einsum("nc,cihw->nihw", project @ to_means, last.weight.double()).float()
    into.bias[:new] = (project @ (to_means @ last.bias.double() + bias - mean)).float()

    to_decoder, bias = _matrix(vae.post_quant_conv, old)
    first, into = vae.decoder.conv_in, narrower.decoder.conv_in
    weight = first.weight.double()
    into.weight.copy_(torch.einsum("ochw,cn->onhw", weight, to_decoder @ (axes / scale)))
    into.bias.copy_(first.bias + torch.einsum("ochw,c->o", weight, to_decoder @ mean + bias))
    for conv in filter(None, (narrower.quant_conv, narrower.post_quant_conv)):
        nn.init.dirac_(conv.weight)
        conv.bias.zero_()
    return narrower


def _load_all_but_latents(vae: KLAutoencoder, other: KLAutoencoder) -> None:
    """Give `other` the tensors of `vae` whose shape does not depend on the number of latent channels."""
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    same = {name: tensor for name, tensor in vae.state_dict().items() if tensor.shape == shapes[name]}
    other.load_state_dict(same, strict=False)


def _matrix(conv: nn.Conv2d | None, channels: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Rows of the weights and the bias of a 1x1 convolution, in float64; for None those of the identity."""
    if conv is None:
        weight, bias = torch.eye(channels), torch.zeros(channels)
    else:
        weight, bias = conv.weight[:, :, 0, 0], conv.bias
    return weight[rows].double(), bias[rows].double()


def _copy_channels(old: nn.Conv2d, new: nn.Conv2d, rows: Tensor, columns: Tensor) -> None:
    """Put the weights of `old` at these output and input channels of `new`; all other biases become 0."""
    new.bias.zero_()
    new.weight[rows[:, None], columns], new.bias[rows] = old.weight, old.bias


def _carry_colours(network: nn.Module, last: ResnetBlock, groups: int) -> None:
    """Let the carriers of an encoder or decoder pass unchanged, except for averaging and interpolation.

    last: its last ResNet block, before `conv_norm_out`, which is made steady.
    """
    average = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])  # of rows and columns 2i and 2i+1
    # with the nearest-neighbour upsampling before it 1/4, 3/4: bilinear
    tent = torch.tensor([0.25, 0.5, 0.25])
    kernels = {"downsamplers": average, "upsamplers": tent.outer(tent), "conv_shortcut": _identity_kernel(1)}
    for name, module in network.named_modules():
        for kind, kernel in kernels.items():
            if kind in name and isinstance(module, nn.Conv2d):
                rows, columns = (_carriers(c, groups) for c in (module.out_channels, module.in_channels))
                _set_channels(module, rows, columns, torch.eye(6), kernel)
        if isinstance(module, ResnetBlock):
            carriers = _carriers(module.conv2.out_channels, groups)
            module.conv2.weight[carriers], module.conv2.bias[carriers] = 0, 0
            _make_steady(module.norm2, module.conv1, BRANCH_DEVIATION)
        if isinstance(module, AttentionBlock):
            carriers = _carriers(module.to_out[0].out_features, groups)
            module.to_out[0].weight[carriers], module.to_out[0].bias[carriers] = 0, 0
    _make_steady(network.conv_norm_out, last.conv2, 1.0)


def _make_steady(norm: nn.GroupNorm, conv: nn.Conv2d, deviation: float) -> None:
    """Make `norm` nearly the map x -> x / deviation, whatever the image; `conv` is the layer before it.

    The last channel of each group of n channels becomes a constant C, by the bias of `conv`. The group then has
    about the mean C/n and the deviation C sqrt(n-1)/n, and C is chosen so that this deviation is STEADY_DEVIATION,
    8. If the other channels have a variance v, that changes the deviation by about the share v / (2 * 8^2). Weight
    and bias of the norm undo this mean and deviation, and set the constant channel to 0.
    """
    n = norm.num_channels // norm.num_groups
    constant = slice(n - 1, None, n)
    conv.weight[constant], conv.bias[constant] = 0, STEADY_DEVIATION * n / math.sqrt(n - 1)
    norm.weight.fill_(STEADY_DEVIATION / deviation)
    norm.bias.fill_(STEADY_DEVIATION / math.sqrt(n - 1) / deviation)
    norm.weight[constant], norm.bias[constant] = 0, 0


def _carriers(width: int, groups: int) -> list[int]:
    """The numbers of the first six of `width` channels that are not the last of their group, which is constant."""
    n = width // groups
    return [channel for channel in range(width) if channel % n != n - 1][:6]


def _identity_kernel(side: int) -> Tensor:
    """A kernel (side, side) that returns the pixel in its middle."""
    kernel = torch.zeros(side, side)
    kernel[side // 2, side // 2] = 1
    return kernel


def _set_channels(
    conv: nn.Conv2d, rows: Sequence[int], columns: Sequence[int], matrix: Tensor, kernel: Tensor
) -> None:
    """Make the output channels `rows` of `conv` depend on the input channels `columns` alone.

    matrix: (rows, columns), how much of each input channel. kernel: the spatial weights, the same for all.
    """
    rows, columns = torch.tensor(rows), torch.tensor(columns)
    conv.weight[rows], conv.bias[rows] = 0, 0
    conv.weight[rows[:, None], columns] = matrix[:, :, None, None] * kernel
