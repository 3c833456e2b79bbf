"""What is trained: the autoencoder with the scale of its likelihood, and the average of its weights."""

import copy
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from kl_autoencoder import DiagonalGaussian, KLAutoencoder
from kl_autoencoder.autoencoder import COMPACT

from .config import ModelConfig
from .start import damp_residual_branches, start_as_enlargement


def build_autoencoder(config: ModelConfig) -> KLAutoencoder:
    """A new network, or the pretrained one: a folder or hub id in diffusers' layout, "compact", or an LDM file.

    Raises ValueError naming the key for what gives no network of RGB images.
    """
    source = config.pretrained
    try:
        if source is None:
            vae = damp_residual_branches(KLAutoencoder(**config.network()))
            vae = start_as_enlargement(vae) if config.start == "enlargement" else vae
        elif Path(source).is_file():
            vae = KLAutoencoder.from_single_file(source, torch_dtype=torch.float32)
        elif (
            Path(source).is_dir()
            or source == COMPACT.name
            or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
        ):
            vae = KLAutoencoder.from_pretrained(source, subfolder=config.subfolder, torch_dtype=torch.float32)
        else:
            raise ValueError("no such folder or file, and no hub id (owner/name)")
    except (ValueError, OSError) as error:
        what = f"model.pretrained: {source!r} cannot be loaded: " if source else "model."
        raise ValueError(f"{what}{error}") from error
    for key in ("in_channels", "out_channels"):
        if vae.config[key] != 3:
            raise ValueError(f"model.{key}: {vae.config[key]}; allowed: 3, photographs are RGB")
    return vae


class TrainedModel(nn.Module):
    """What the optimizer moves and DDP wraps.

    `forward` returns all that the loss needs, so that no wrapper is ever bypassed.
    """

    def __init__(self, vae: KLAutoencoder, learn_scale: bool, decoder_only: bool):
        super().__init__()
        self.vae = vae
        self.log_scale = nn.Parameter(torch.zeros(())) if learn_scale else None
        self.decoder_only = decoder_only
        if decoder_only:
            vae.encoder.requires_grad_(False)
            if vae.quant_conv is not None:
                vae.quant_conv.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian, Tensor | None]:
        """Images (B, 3, H, W), noise (B, C, h, w) -> reconstruction, posterior, log scale of the likelihood."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            posterior = self.vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise  # reparameterised, Kingma & Welling 2013, section 2.4
        return self.vae.decode(z.to(posterior.mean.dtype)).sample, posterior, self.log_scale


class MovingAverage:
    """Exponential moving average of an autoencoder's weights, in float32: `vae` is the averaged model."""

    def __init__(self, vae: KLAutoencoder, decay: float):
        self.decay = decay
        self.vae = copy.deepcopy(vae).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, vae: KLAutoencoder, step: int) -> None:
        """`step` counts from 1; the decay rises with it, so that the first weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.vae.parameters()), list(vae.parameters()), 1 - decay)
