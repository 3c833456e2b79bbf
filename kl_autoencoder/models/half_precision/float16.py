"""float16 without black images: measure which activations overflow, and rescale weights so that they do not.

GroupNorm's output does not depend on the scale of a group of channels. So a tensor that is read only by GroupNorms
and linear maps may be divided by a constant, one for each group: the weights and biases of the layers that write it
are divided by the constant, the weights of the linear maps that read it are multiplied by it. Constants are powers
of two, so that nothing is rounded. Only GroupNorm's eps, which AutoencoderKL's config does not have, cannot be
rescaled: `norm_change` tells the effect of this.

Measured are all tensors that the plain network or a fused one writes in float16, including the result of a
convolution before its bias is added (torch adds it to cuDNN's result), attention scores, and the weights. Not
measured are values held in float32: sums inside a convolution or a matrix product, GroupNorm's statistics, the
softmax. MARGIN leaves room for libraries that do sum in float16 (four neighbours in the input of a Winograd
convolution, partial products).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...networks.convolutional import NORM_EPS, AttentionBlock, Decoder, Encoder, ResnetBlock
from ..autoencoder_kl import KLAutoencoder

LARGEST = 65504.0  # largest finite float16
MARGIN = 4.0  # other images may have larger activations than those measured
LIMIT = LARGEST / MARGIN
WEIGHTS = "the largest weight"  # its name among those of layers
QUERIES = 1024  # attention scores are computed for this many queries at a time
WATCHED = (nn.Conv2d, nn.Linear, nn.GroupNorm, ResnetBlock, AttentionBlock)


@dataclass
class Activations:
    """The range of a model's activations, by layer; the name of a block stands for the residual stream after it.

    largest: the largest |value| of every channel, (C,); under the name of an attention block and `.scores`, the
        largest |q.k| / sqrt(C), (1,).
    variance: the smallest variance of every group of channels in the input of a GroupNorm, (groups,).
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    variance: dict[str, Tensor] = field(default_factory=dict)

    def by_layer(self) -> dict[str, float]:
        """Return the largest |value| of each layer, largest first."""
        reached = {name: channels.max().item() for name, channels in self.largest.items()}
        return dict(sorted(reached.items(), key=lambda item: -item[1]))

    def unsafe(self, limit: float = LIMIT) -> list[str]:
        """Return the layers with a |value| above `limit`, worst first."""
        return [name for name, value in self.by_layer().items() if value > limit]

    def add(self, name: str, channels: Tensor) -> None:
        """Take in the largest |values| (C,) of a layer. Raises ValueError if one is not finite."""
        if not channels.isfinite().all():
            raise ValueError(
                f"{name}: not finite in {channels.dtype} already, float16 is not what ails this model"
            )
        self.largest[name] = torch.maximum(channels, self.largest.get(name, channels))


def largest_activations(vae: KLAutoencoder, images: Tensor) -> dict[str, float]:
    """Return for each layer the largest |value| on images (B, C, H, W) in [-1, 1] and on their latents.

    float16 overflows above 65504. Raises the errors of `measure`.
    """
    return measure(vae, images.split(1)).by_layer()


@torch.no_grad()
def measure(vae: KLAutoencoder, images: Iterable[Tensor], latents: Iterable[Tensor] = ()) -> Activations:
    """Measure a model's activations on batches of images (B, C, H, W) in [-1, 1] and raw latents (B, C, h, w).

    Images are encoded and the mode of their posterior is decoded; `latents` are decoded. Raises ValueError for
    images that do not fit the model, for a model that is not in float32 or float64, and for activations that are
    not finite.
    """
    if vae.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"vae: in {vae.dtype}; allowed: float32, in which nothing overflows")
    with recording(vae) as reached:
        for x in images:
            decoded(vae, encoded(vae, x))
        for z in latents:
            decoded(vae, z)
    return reached


def encoded(vae: KLAutoencoder, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> mode of the posterior, by the plain modules.

    ValueError for another shape.
    """
    channels, f = vae.config.in_channels, vae.downsampling
    if (
        images.ndim != 4
        or images.shape[1] != channels
        or any(size % f or not size for size in images.shape[2:])
    ):
        shape = f"(B, {channels}, H, W), H and W multiples of {f}"
        raise ValueError(f"images: shape {tuple(images.shape)}; allowed: {shape}")
    moments = vae.encoder(images.to(vae.device, vae.dtype))
    return (vae.quant_conv(moments) if vae.quant_conv else moments)[:, : vae.config.latent_channels]


def decoded(vae: KLAutoencoder, z: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) -> images, by the plain modules."""
    z = z.to(vae.device, vae.dtype)
    return vae.decoder(vae.post_quant_conv(z) if vae.post_quant_conv else z)


@contextmanager
def recording(vae: KLAutoencoder) -> Iterator[Activations]:
    """Measure the activations of everything that the model's plain modules compute within the `with` statement."""
    reached = Activations()
    reached.add(WEIGHTS, torch.stack([p.abs().max() for p in vae.parameters()]).max()[None])

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            channel = output.ndim - 1 if isinstance(module, nn.Linear) else 1
            others = [dim for dim in range(output.ndim) if dim != channel]
            ends = torch.stack([output.amin(others), output.amax(others)])
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                ends = torch.cat([ends, ends - module.bias])
            reached.add(name, ends.abs().amax(0))
            if isinstance(module, nn.GroupNorm):
                groups = inputs[0].unflatten(1, (module.num_groups, -1)).flatten(2)
                variance = groups.var(dim=2, unbiased=False).amin(0)
                reached.variance[name] = torch.minimum(variance, reached.variance.get(name, variance))
            if isinstance(module, AttentionBlock):
                reached.add(f"{name}.scores", _largest_score(module, inputs[0]))

        return record

    watched = [(name, module) for name, module in vae.named_modules() if isinstance(module, WATCHED)]
    handles = [module.register_forward_hook(hook(name)) for name, module in watched]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _largest_score(block: AttentionBlock, x: Tensor) -> Tensor:
    """Return the largest |q.k| / sqrt(C) of an attention block on x (B, C, H, W): (1,)."""
    tokens = block.group_norm.forward(x).flatten(2).mT  # `forward`, so that no hook is called
    q, k = block.to_q.forward(tokens), block.to_k.forward(tokens)
    scores = [(some @ k.mT).abs().max() for some in q.split(QUERIES, dim=1)]
    return torch.stack(scores).max()[None] / math.sqrt(q.shape[-1])


# -------------------------------------------------------------------------------- rewriting


@dataclass
class FreeScale:
    """Tensors that can be multiplied by a common factor, since only GroupNorms and linear maps read them.

    tensors: the modules with these outputs. writers: those of them whose weights and biases set the scale. readers:
    the linear maps that read the tensors. groups: each of so many groups of channels has its own factor.
    """

    tensors: list[nn.Module]
    writers: list[nn.Module]
    readers: list[nn.Module]
    groups: int

    def carry_on(self, writer: nn.Module, block: nn.Module) -> None:
        """Add the residual stream after `block`, whose layer `writer` adds to the stream."""
        self.tensors += [writer, block]
        self.writers.append(writer)

    def scale(self, by: Tensor) -> None:
        """Multiply every channel of the tensors by `by` (C,), and divide the readers' weights by it."""
        for module in self.writers:
            module.weight.mul_(by.view(-1, *[1] * (module.weight.ndim - 1)))
            module.bias.mul_(by)
        for module in self.readers:
            module.weight.div_(by.view(1, -1, *[1] * (module.weight.ndim - 2)))


def free_scales(vae: KLAutoencoder) -> list[FreeScale]:
    """Return all sets of tensors in the network whose scale is free."""
    groups = vae.config.norm_num_groups
    found = []
    for network in (vae.encoder, vae.decoder):
        stream = FreeScale([network.conv_in], [network.conv_in], [], groups)
        found.append(stream)
        for block in _blocks(network):
            if isinstance(block, AttentionBlock):
                projections = [block.to_q, block.to_k, block.to_v]
                found.append(FreeScale([block.group_norm], [block.group_norm], projections, 1))
                found.append(FreeScale([block.to_v], [block.to_v], [block.to_out[0]], 1))
                stream.carry_on(block.to_out[0], block)
                continue
            # A convolution in the residual stream itself (not a branch) ends one scale and begins another.
            is_resnet = isinstance(block, ResnetBlock)
            crossing = block.conv_shortcut if is_resnet else block.conv
            if isinstance(crossing, nn.Conv2d):
                stream.readers.append(crossing)
                stream = FreeScale([crossing], [crossing], [], groups)
                found.append(stream)
            if is_resnet:
                found.append(FreeScale([block.conv1], [block.conv1], [], groups))
                stream.carry_on(block.conv2, block)
    if vae.quant_conv:
        found.append(FreeScale([vae.encoder.conv_out], [vae.encoder.conv_out], [vae.quant_conv], 1))
    if vae.post_quant_conv:
        found.append(FreeScale([vae.post_quant_conv], [vae.post_quant_conv], [vae.decoder.conv_in], 1))
    return found


def _blocks(network: Encoder | Decoder) -> list[nn.Module]:
    """Return the blocks of a network between conv_in and conv_norm_out, in order."""
    before, after = getattr(network, "down_blocks", []), getattr(network, "up_blocks", [])
    return [block for stage in (*before, network.mid_block, *after) for block in stage.blocks()]


@torch.no_grad()
def rescaled(vae: KLAutoencoder, reached: Activations, limit: float = LIMIT) -> KLAutoencoder:
    """Return a model of the same function whose tensors are within `limit` on the inputs `reached` was measured on.

    Groups of channels above the limit are divided by the smallest power of two that suffices; others are not
    changed. The inputs of SiLU, attention scores and the network's results cannot be rescaled: call `measure` on
    the result to see whether they are within the limit. The model is a copy, of the dtype of `vae`; its config has
    `force_upcast` False.
    """
    fixed = copied(vae, vae.dtype, force_upcast=False)
    names = {module: name for name, module in fixed.named_modules()}
    for free_scale in free_scales(fixed):
        largest = torch.stack([reached.largest[names[module]] for module in free_scale.tensors]).amax(0)
        free_scale.scale(_power_of_two(largest, free_scale.groups, limit))
    for module, name in names.items():
        if isinstance(module, AttentionBlock):
            _balance(module, *(reached.largest[f"{name}.{p}"].max() for p in ("to_q", "to_k")), limit)
    return fixed


def _power_of_two(largest: Tensor, groups: int, limit: float) -> Tensor:
    """Largest |values| (C,) -> factors (C,), for each group the largest power of two up to 1 within `limit`."""
    by_group = largest.cpu().double().unflatten(0, (groups, -1))
    exponent = (limit / by_group.amax(1, keepdim=True)).log2().floor().clamp(max=0)
    return exponent.exp2().expand_as(by_group).flatten().to(largest)


def _balance(block: AttentionBlock, q: Tensor, k: Tensor, limit: float) -> None:
    """If queries or keys exceed `limit`, give both about the same range, which leaves q.k unchanged."""
    if max(q, k) > limit:
        by = (k / q).sqrt().log2().round().exp2()
        for module, factor in ((block.to_q, by), (block.to_k, 1 / by)):
            module.weight.mul_(factor)
            module.bias.mul_(factor)


def norm_change(before: Activations, after: Activations) -> float:
    """Return the largest relative change of a GroupNorm's output by rescaling, on the inputs that were measured.

    A norm computes (x - mean) / sqrt(variance + eps). For s x it computes s (x - mean) / sqrt(s^2 variance + eps),
    which is (x - mean) / sqrt(variance + eps / s^2): as if eps had changed.
    """
    changes = [
        1 - _shrinkage(after.variance[name]) / _shrinkage(variance)
        for name, variance in before.variance.items()
    ]
    return torch.cat(changes).abs().nan_to_num(0).max().item()


def _shrinkage(variance: Tensor) -> Tensor:
    """Return the factor sqrt(variance / (variance + eps)) by which eps shrinks a norm's output."""
    variance = variance.cpu().double()
    return (variance / (variance + NORM_EPS)).sqrt()


def copied(vae: KLAutoencoder, dtype: torch.dtype, **config) -> KLAutoencoder:
    """Return a copy of the model for inference, in `dtype`, with `config` entries replaced."""
    given = {key: value for key, value in vae.config.items() if key not in config and key[0] != "_"}
    with torch.device("meta"):  # without private entries: one of them would restore defaults over `config`
        known = {key: value for key, value in config.items() if key in vae.rules}
        copy = type(vae).from_config({**given, **known})
    tensors = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in vae.state_dict().items()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy.eval().requires_grad_(False)
