"""Make the autoencoder inside any diffusers pipeline faster, with the same result: `optimize`, and `restore`.

Nothing of the pipeline is replaced. The modules Encoder and Decoder of diffusers' autoencoders get classes derived
from their own, `ExactEncoder` and `ExactDecoder`, whose `forward` is computed by `inference`. So the autoencoder
keeps its class, config, tensors and saved form, and hooks find its methods. What it does around the two modules
(quant convolutions, batch-norm statistics, slicing) stays diffusers' code.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders import vae as theirs
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from ..inference.dispatch import infer_exactly, why_whole
from .autoencoder_kl import ExactAutoencoder

Optimized = TypeVar("Optimized")
UNUSED = ("condition_encoder",)  # parts of MaskConditionDecoder that compute nothing without a mask


def optimize(pipe_or_vae: Optimized, tiling: bool | None = None, offload: bool = False) -> Optimized:
    """Let an autoencoder, or the autoencoders of a pipeline, compute the same in less time and memory; returns it.

    Works in place: no tensor is copied, classes and configs stay, and `restore` undoes it. Later changes of the
    pipeline take effect. If something requires whole execution (hooks of group offloading, special attention
    processors ...), diffusers' own code computes the network, with one warning that says why.

    Args:
        tiling: True: always take the least memory; False: never. By default wherever diffusers would tile: after
            `enable_tiling`, for images larger than its tiles. The result is exact, unlike that of diffusers' tiles.
        offload: when tiling, keep the large activations in host memory.

    Raises ValueError if there is no autoencoder that can be optimized.
    """
    ours = [module for module in _modules(pipe_or_vae) if isinstance(module, ExactAutoencoder)]
    for vae in ours:
        vae.enable_tiling(vae.use_tiling if tiling is None else tiling, offload=offload)
    networks = [(owner, network) for owner, network in _networks(pipe_or_vae) if owner not in ours]
    if not networks and not ours:
        raise ValueError(
            f"{type(pipe_or_vae).__name__}: no encoder or decoder that can be optimized; allowed: a pipeline or an "
            f"autoencoder with diffusers' Encoder or Decoder (AutoencoderKL, AutoencoderKLFlux2, VQModel ...)"
        )
    for owner, network in networks:
        _change_class(network, EXACT.get(type(network), type(network)))
        network.tiling, network.offload, network.warned_causes = tiling, offload, set()
        for name, tiled in TILED.items():
            if hasattr(type(owner), name):
                setattr(owner, name, partial(tiled, owner))
    return pipe_or_vae


def restore(pipe_or_vae: Optimized) -> Optimized:
    """Undo `optimize`; returns its argument. (A KLAutoencoder is left as it is: it is exact by itself.)"""
    for owner, network in _networks(pipe_or_vae):
        if isinstance(network, _Exact):
            _change_class(network, network.plain)
            for name in ("tiling", "offload", "warned_causes"):
                del network.__dict__[name]
        for name in TILED:
            owner.__dict__.pop(name, None)
    return pipe_or_vae


class _Exact:
    """A network of diffusers that is computed in pieces if possible.

    `optimize` sets the attributes of instances.
    """

    plain: type[nn.Module]
    tiling: bool | None
    offload: bool
    warned_causes: set[str]  # causes of whole execution that were warned about

    def execute(self, x: Tensor, tiled: bool) -> Tensor:
        """Return network(x). tiled: diffusers would compute this call in tiles."""
        network, least = _plain_view(self), tiled if self.tiling is None else self.tiling
        cause = why_whole(network, x)
        if cause is None:
            return infer_exactly(network, x, least, least and self.offload)
        if cause not in self.warned_causes:
            self.warned_causes.add(cause)
            warnings.warn(
                f"{self.plain.__name__}: not optimized, computed by diffusers: {cause}", stacklevel=2
            )
        return network(x)


class ExactEncoder(_Exact, theirs.Encoder):
    """diffusers' Encoder, computed in pieces."""

    plain = theirs.Encoder

    def forward(self, sample: Tensor, tiled: bool = False) -> Tensor:
        return super().forward(sample) if _is_traced() else self.execute(sample, tiled)


class ExactDecoder(_Exact, theirs.Decoder):
    """diffusers' Decoder, computed in pieces, unless it gets `latent_embeds` for its norms."""

    plain = theirs.Decoder

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None, tiled: bool = False) -> Tensor:
        if latent_embeds is not None or _is_traced():
            return super().forward(sample, latent_embeds)
        return self.execute(sample, tiled)


class ExactMaskDecoder(_Exact, theirs.MaskConditionDecoder):
    """diffusers' MaskConditionDecoder (of AsymmetricAutoencoderKL), computed in pieces if there is no mask."""

    plain = theirs.MaskConditionDecoder

    def forward(
        self,
        z: Tensor,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        latent_embeds: Tensor | None = None,
    ) -> Tensor:
        is_masked = image is not None and mask is not None
        if is_masked or latent_embeds is not None or _is_traced():
            return super().forward(z, image, mask, latent_embeds)
        return self.execute(z, tiled=False)


EXACT = {cls.plain: cls for cls in (ExactEncoder, ExactDecoder, ExactMaskDecoder)}


# ---------------------------------------------------------------- exact in place of diffusers' tiles


def tiled_encode(vae: Any, x: Tensor) -> Tensor:
    """Images -> moments, in the least memory; replaces `_tiled_encode` of an autoencoder."""
    if not isinstance(vae.encoder, ExactEncoder):  # replaced or compiled since
        return type(vae)._tiled_encode(vae, x)
    moments = vae.encoder(x, tiled=True)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


def tiled_decode(vae: Any, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    """Raw latents -> images, in the least memory; replaces `tiled_decode` of an autoencoder."""
    if not isinstance(vae.decoder, ExactDecoder):
        return type(vae).tiled_decode(vae, z, return_dict)
    z = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    images = vae.decoder(z, tiled=True)
    return DecoderOutput(sample=images) if return_dict else (images,)


TILED = {"_tiled_encode": tiled_encode, "tiled_decode": tiled_decode}


# ---------------------------------------------------------------- modules


def _modules(pipe_or_vae: Any) -> Iterator[nn.Module]:
    """Yield all modules of a pipeline's components, or of a model."""
    components = getattr(pipe_or_vae, "components", None) or {"": pipe_or_vae}
    for component in components.values():
        if isinstance(component, nn.Module):
            yield from component.modules()


def _networks(pipe_or_vae: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (owner, network) for each encoder and decoder of diffusers' classes, optimized or not."""
    for owner in list(_modules(pipe_or_vae)):
        for network in owner.children():
            if type(network) in EXACT or isinstance(network, _Exact):
                yield owner, network


def _change_class(network: nn.Module, new: type) -> None:
    """Change the class of a network in place, and the bound `forward` that hooks may hold."""
    old = type(network).forward
    network.__class__ = new
    # accelerate's hooks keep the bound `forward` in the instance, also after their removal.
    for name in ("forward", "_old_forward"):
        held = network.__dict__.get(name)
        if isinstance(held, MethodType) and held.__func__ is old:
            network.__dict__[name] = MethodType(new.forward, network)


def _plain_view(network: Any) -> nn.Module:
    """Return a module of diffusers' class with the network's parts, without its hooks and its own `forward`."""
    view = network.plain.__new__(network.plain)
    nn.Module.__init__(view)
    state = network.__dict__
    parts = {name: part for name, part in state["_modules"].items() if name not in UNUSED}
    view.__dict__.update(_modules=parts, training=state["training"])
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if name in state:
            view.__dict__[name] = state[name]
    return view


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
