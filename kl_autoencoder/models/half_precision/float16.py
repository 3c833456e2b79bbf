"""float16 without black images: what overflows in an autoencoder, and weights of the same function that do not.

GroupNorm does not see the scale of a group of channels, so whatever only GroupNorms and linear maps read may
be divided by a constant, group by group: what writes it gets that much smaller weights and biases, the linear
maps that read it that much larger weights. With powers of two this rounds nothing. Only GroupNorm's eps, which
AutoencoderKL's config does not hold, stays as it was: `norm_change` says what that makes of it.

What is counted: every tensor that the plain network or a fused one writes in float16, each convolution also
before its bias is added (torch adds it to what cuDNN returns), the attention scores, and the weights. What is
not, since it is held in float32: sums inside a convolution or a matrix product, GroupNorm's statistics, the
softmax. Where a library sums in float16 after all (four neighbours in the input of a Winograd convolution,
partial products), MARGIN is what there is for it.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...networks.convolutional import NORM_EPS, AttentionBlock, Decoder, Encoder, ResnetBlock
from ..autoencoder_kl import KLAutoencoder

LARGEST = 65504.0  # in float16; beyond is infinity
MARGIN = 4.0  # other images reach further than those measured
LIMIT = LARGEST / MARGIN
WEIGHTS = "the largest weight"  # among the layers' names
QUERIES = 1024  # whose scores are held at a time
WATCHED = (nn.Conv2d, nn.Linear, nn.GroupNorm, ResnetBlock, AttentionBlock)


@dataclass
class Activations:
    """What a model's tensors reached, by layer; blocks stand for the residual stream behind them.

    largest: the largest |value| of every channel, (C,); `.scores` of an attention, q.k / sqrt(C), (1,).
    variance: the smallest variance of every group of channels that a GroupNorm read, (groups,).
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    variance: dict[str, Tensor] = field(default_factory=dict)

    def by_layer(self) -> dict[str, float]:
        """The largest |value| of each layer, largest first."""
        reached = {name: channels.max().item() for name, channels in self.largest.items()}
        return dict(sorted(reached.items(), key=lambda item: -item[1]))

    def unsafe(self, limit: float = LIMIT) -> list[str]:
        """The layers that reach beyond `limit`, worst first."""
        return [name for name, value in self.by_layer().items() if value > limit]

    def add(self, name: str, channels: Tensor) -> None:
        if not channels.isfinite().all():
            raise ValueError(
                f"{name}: not finite in {channels.dtype} already, float16 is not what ails this model"
            )
        self.largest[name] = torch.maximum(channels, self.largest.get(name, channels))


def largest_activations(vae: KLAutoencoder, images: Tensor) -> dict[str, float]:
    """Layer -> the largest |value| that it reaches on images (B, C, H, W) in [-1, 1] and their latents.

    Beyond 65504 float16 overflows. Raises as `measure`.
    """
    return measure(vae, images.split(1)).by_layer()


@torch.no_grad()
def measure(vae: KLAutoencoder, images: Iterable[Tensor], latents: Iterable[Tensor] = ()) -> Activations:
    """What the model's tensors reach on batches of images (B, C, H, W) in [-1, 1], and of latents (B, C, h, w).

    Images are encoded, and the mode of what comes out is decoded; `latents`, raw, are decoded. Raises
    ValueError for images that do not fit the model, a model that is not in float32, or is not finite there.
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
    """Images -> the mode of their latents, by the plain modules."""
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
    """Raw latents -> images, by the plain modules."""
    z = z.to(vae.device, vae.dtype)
    return vae.decoder(vae.post_quant_conv(z) if vae.post_quant_conv else z)


@contextmanager
def recording(vae: KLAutoencoder) -> Iterator[Activations]:
    """What the model's tensors reach in whatever it computes, with its plain modules, within the block."""
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
    tokens = block.group_norm.forward(x).flatten(2).mT  # forward: without the hooks
    q, k = block.to_q.forward(tokens), block.to_k.forward(tokens)
    scores = [(some @ k.mT).abs().max() for some in q.split(QUERIES, dim=1)]
    return torch.stack(scores).max()[None] / math.sqrt(q.shape[-1])


# -------------------------------------------------------------------------------- rewriting


@dataclass
class Wire:
    """Tensors that share a scale which nothing sees: GroupNorms apart, only linear maps read them.

    `tensors` are the modules whose outputs they are, `writers` those of them whose weights make the scale,
    `readers` the linear maps that read it. The channels of one of `groups` groups share a scale.
    """

    tensors: list[nn.Module]
    writers: list[nn.Module]
    readers: list[nn.Module]
    groups: int

    def carry_on(self, writer: nn.Module, block: nn.Module) -> None:
        """The residual stream behind `block`, to which `writer` added."""
        self.tensors += [writer, block]
        self.writers.append(writer)

    def scale(self, by: Tensor) -> None:
        """Multiply every channel by `by` (C,)."""
        for module in self.writers:
            module.weight.mul_(by.view(-1, *[1] * (module.weight.ndim - 1)))
            module.bias.mul_(by)
        for module in self.readers:
            module.weight.div_(by.view(1, -1, *[1] * (module.weight.ndim - 2)))


def wires(vae: KLAutoencoder) -> list[Wire]:
    """Every place of the network where a scale is free."""
    groups = vae.config.norm_num_groups
    found = []
    for network in (vae.encoder, vae.decoder):
        stream = Wire([network.conv_in], [network.conv_in], [], groups)
        found.append(stream)
        for block in _blocks(network):
            if isinstance(block, AttentionBlock):
                projections = [block.to_q, block.to_k, block.to_v]
                found.append(Wire([block.group_norm], [block.group_norm], projections, 1))
                found.append(Wire([block.to_v], [block.to_v], [block.to_out[0]], 1))
                stream.carry_on(block.to_out[0], block)
                continue
            # A convolution within the stream, the only way on, is where its scale may change.
            is_resnet = isinstance(block, ResnetBlock)
            crossing = block.conv_shortcut if is_resnet else block.conv
            if isinstance(crossing, nn.Conv2d):
                stream.readers.append(crossing)
                stream = Wire([crossing], [crossing], [], groups)
                found.append(stream)
            if is_resnet:
                found.append(Wire([block.conv1], [block.conv1], [], groups))
                stream.carry_on(block.conv2, block)
    if vae.quant_conv:
        found.append(Wire([vae.encoder.conv_out], [vae.encoder.conv_out], [vae.quant_conv], 1))
    if vae.post_quant_conv:
        found.append(Wire([vae.post_quant_conv], [vae.post_quant_conv], [vae.decoder.conv_in], 1))
    return found


def _blocks(network: Encoder | Decoder) -> list[nn.Module]:
    before, after = getattr(network, "down_blocks", []), getattr(network, "up_blocks", [])
    return [block for stage in (*before, network.mid_block, *after) for block in stage.blocks()]


@torch.no_grad()
def rescaled(vae: KLAutoencoder, reached: Activations, limit: float = LIMIT) -> KLAutoencoder:
    """A model of the same function, with every tensor within `limit` on what `reached` was measured on.

    Only groups of channels beyond the limit are shrunk, by the least power of two that suffices; its config has
    `force_upcast` False; it shares no tensor with `vae` and has its floating type. What has no free scale stays
    as it is (what SiLU reads, attention scores, the results): `measure` tells whether that is within the limit.
    """
    fixed = copied(vae, vae.dtype, force_upcast=False)
    names = {module: name for name, module in fixed.named_modules()}
    for wire in wires(fixed):
        largest = torch.stack([reached.largest[names[module]] for module in wire.tensors]).amax(0)
        wire.scale(_power_of_two(largest, wire.groups, limit))
    for module, name in names.items():
        if isinstance(module, AttentionBlock):
            _balance(module, *(reached.largest[f"{name}.{p}"].max() for p in ("to_q", "to_k")), limit)
    return fixed


def _power_of_two(largest: Tensor, groups: int, limit: float) -> Tensor:
    """(C,) -> (C,): for each group the largest power of two up to 1 that takes it within `limit`."""
    by_group = largest.cpu().double().unflatten(0, (groups, -1))
    exponent = (limit / by_group.amax(1, keepdim=True)).log2().floor().clamp(max=0)
    return exponent.exp2().expand_as(by_group).flatten().to(largest)


def _balance(block: AttentionBlock, q: Tensor, k: Tensor, limit: float) -> None:
    """If queries or keys are beyond `limit`, make them alike: q.k depends on the product of their scales alone."""
    if max(q, k) > limit:
        by = (k / q).sqrt().log2().round().exp2()
        for module, factor in ((block.to_q, by), (block.to_k, 1 / by)):
            module.weight.mul_(factor)
            module.bias.mul_(factor)


def norm_change(before: Activations, after: Activations) -> float:
    """By how much of its value eps changes the output of any norm, at most, on what both were measured on.

    A norm gives (x - mean) / sqrt(variance + eps); x scaled by s gives .../ sqrt(variance + eps / s^2).
    """
    changes = [
        1 - _share(after.variance[name]) / _share(variance) for name, variance in before.variance.items()
    ]
    return torch.cat(changes).abs().nan_to_num(0).max().item()


def _share(variance: Tensor) -> Tensor:
    variance = variance.cpu().double()
    return (variance / (variance + NORM_EPS)).sqrt()


def copied(vae: KLAutoencoder, dtype: torch.dtype, **config) -> KLAutoencoder:
    """The model for inference with tensors of its own, of `dtype`, and other `config` entries."""
    given = {key: value for key, value in vae.config.items() if key not in config and key[0] != "_"}
    with torch.device("meta"):  # without the private entries: one of them brings defaults back over `config`
        known = {key: value for key, value in config.items() if key in vae.rules}
        copy = type(vae).from_config({**given, **known})
    tensors = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in vae.state_dict().items()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy.eval().requires_grad_(False)
