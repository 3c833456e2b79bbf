"""Make the autoencoder inside any diffusers pipeline faster, exactly: `optimize`, and `restore`.

Nothing of the pipeline is replaced. The encoder and decoder modules that diffusers' autoencoders share get
classes derived from their own, `ExactEncoder` and `ExactDecoder`, whose `forward` is computed by `inference`. So
the autoencoder keeps its class, config, tensors and saved form; what it does around the two (quant convolutions,
batch-norm statistics, slicing) stays diffusers' code, and hooks find the methods where they look for them.
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
UNUSED = ("condition_encoder",)  # by MaskConditionDecoder, without a mask


def optimize(pipe_or_vae: Optimized, tiling: bool | None = None, offload: bool = False) -> Optimized:
    """Let a pipeline's autoencoders, or an autoencoder, compute the same in less time and memory; returns it.

    In place: no tensor is copied, classes and configs stay, and `restore` undoes it. What happens to the pipeline
    afterwards is followed. Where something needs the network whole (hooks of group offloading, processors of
    one's own, ...) diffusers' own code computes it, with the same result and one warning that says why.

    Args:
        tiling: the least memory, for all sizes; False: never. By default where `enable_tiling` makes the
            autoencoder tile, for images larger than its tiles. Exact: what diffusers' tiles approximate is
            computed as a whole.
        offload: where it tiles, keep the large activations in host memory.

    Raises ValueError if it has no autoencoder that can be optimized.
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
        _give_class(network, EXACT.get(type(network), type(network)))
        network.tiling, network.offload, network.warned_causes = tiling, offload, set()
        for name, tiled in TILED.items():
            if hasattr(type(owner), name):
                setattr(owner, name, partial(tiled, owner))
    return pipe_or_vae


def restore(pipe_or_vae: Optimized) -> Optimized:
    """Undo `optimize`; returns what it was given. (A KLAutoencoder is exact by itself: nothing to undo.)"""
    for owner, network in _networks(pipe_or_vae):
        if isinstance(network, _Exact):
            _give_class(network, network.plain)
            for name in ("tiling", "offload", "warned_causes"):
                del network.__dict__[name]
        for name in TILED:
            owner.__dict__.pop(name, None)
    return pipe_or_vae


class _Exact:
    """What is computed in pieces where it can be; `tiling`, `offload` and `warned_causes` are set by `optimize`."""

    plain: type[nn.Module]
    tiling: bool | None
    offload: bool
    warned_causes: set[str]  # the causes that there were warnings about

    def execute(self, x: Tensor, tiled: bool) -> Tensor:
        """The network of x; `tiled`: the autoencoder would compute it in tiles."""
        network, least = _plain(self), tiled if self.tiling is None else self.tiling
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
    """diffusers' Decoder, computed in pieces, unless its norms read `latent_embeds`."""

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


# ---------------------------------------------------------------- what diffusers' tiles approximate


def tiled_encode(vae: Any, x: Tensor) -> Tensor:
    """The moments of images, in the least memory: for `_tiled_encode` of an autoencoder."""
    if not isinstance(vae.encoder, ExactEncoder):  # replaced or compiled since
        return type(vae)._tiled_encode(vae, x)
    moments = vae.encoder(x, tiled=True)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


def tiled_decode(vae: Any, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    """Images of raw latents, in the least memory: for `tiled_decode` of an autoencoder."""
    if not isinstance(vae.decoder, ExactDecoder):
        return type(vae).tiled_decode(vae, z, return_dict)
    z = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    images = vae.decoder(z, tiled=True)
    return DecoderOutput(sample=images) if return_dict else (images,)


TILED = {"_tiled_encode": tiled_encode, "tiled_decode": tiled_decode}


# ---------------------------------------------------------------- modules


def _modules(pipe_or_vae: Any) -> Iterator[nn.Module]:
    components = getattr(pipe_or_vae, "components", None) or {"": pipe_or_vae}
    for component in components.values():
        if isinstance(component, nn.Module):
            yield from component.modules()


def _networks(pipe_or_vae: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each encoder and decoder that is diffusers', plain or exact, after the module that holds it."""
    for owner in list(_modules(pipe_or_vae)):
        for network in owner.children():
            if type(network) in EXACT or isinstance(network, _Exact):
                yield owner, network


def _give_class(network: nn.Module, new: type) -> None:
    old = type(network).forward
    network.__class__ = new
    for name in ("forward", "_old_forward"):  # what accelerate's hooks hold, and leave behind
        held = network.__dict__.get(name)
        if isinstance(held, MethodType) and held.__func__ is old:
            network.__dict__[name] = MethodType(new.forward, network)


def _plain(network: Any) -> nn.Module:
    """The network as a module of diffusers' class, of the same tensors, without what surrounds its `forward`."""
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
