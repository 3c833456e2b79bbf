"""The term `alignment` of VA-VAE (Yao et al. 2025, arXiv 2501.01423): latents made like frozen features.

A learned matrix projects each latent to the features that a vision transformer (DINOv2 by default) has of the same
patch. The projection is to have their direction, and any two places of an image are to be as alike as there.
"""

from contextlib import nullcontext
from inspect import signature
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_autoencoder.extras import needs

from ..settings import choice, key, section
from .registry import TERMS
from .terms import Term

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and deviation of what most of them are trained on
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@section
class AlignmentConfig:
    """Latents like features. VA-VAE multiplies its weight by |grad nll| / |grad alignment|; this one is fixed."""

    kind: Literal["alignment"] = choice("alignment", "latents are told apart as frozen features are")
    features: str = key(
        "facebook/dinov2-large", "a folder or a hub id of a vision transformer that transformers loads"
    )
    weight: float = key(0.1, "of the term", above=0, high=1e6)
    cosine_margin: float = key(0.5, "a cosine so far from 1 costs nothing", low=0, high=2)
    distance_margin: float = key(
        0.25, "two places' cosine may differ so much from that of their features", low=0, high=2
    )


@TERMS.register(AlignmentConfig)
def alignment(config: AlignmentConfig, run) -> Term:
    """Raises ValueError for a network that cannot be loaded, and where the encoder is not trained."""
    if run.train.decoder_only:
        raise ValueError(
            "loss.terms: alignment with train.decoder_only; allowed: where the encoder is trained, too"
        )
    network = FrozenFeatures(config.features, HALVES.get(run.train.mixed_precision))

    def compute(projected: Tensor, images: Tensor) -> Tensor:
        wanted = network(images, *projected.shape[2:])
        return misalignment(projected, wanted, config.cosine_margin, config.distance_margin)

    return Term(
        "alignment",
        "latents",
        lambda step: config.weight,
        compute,
        learned=lambda channels: nn.Conv2d(channels, network.width, 1, bias=False),
    )


def misalignment(
    projected: Tensor, features: Tensor, cosine_margin: float = 0.5, distance_margin: float = 0.25
) -> Tensor:
    """Marginal cosine and marginal distance matrix loss (sections 3.2.1 and 3.2.2), a scalar, in float32.

    projected, features: (B, D, h, w). 0 is least, where each pair of vectors points the same way.
    """
    a, b = (F.normalize(x.float().flatten(2), dim=1) for x in (projected, features))  # (B, D, h*w)
    cosine = F.relu(1 - cosine_margin - (a * b).sum(dim=1)).mean()
    differences = (a.mT @ a - b.mT @ b).abs()
    return cosine + F.relu(differences - distance_margin).mean()


class FrozenFeatures:
    """The patches' features of a vision transformer, of images in [-1, 1], on the grid of the latents.

    source: a folder or hub id. width: the features' channels. half: a type to compute them in, or None.
    """

    def __init__(self, source: str, half: torch.dtype | None = None):
        with needs("alignment"):
            from transformers import AutoModel
        try:
            network = AutoModel.from_pretrained(source)
            self.patch, self.width = int(network.config.patch_size), int(network.config.hidden_size)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0][:80]
            raise ValueError(
                f"loss.terms: alignment.features: {source[:80]!r} cannot be loaded ({reason}); allowed: a folder "
                "or hub id of a vision transformer with patches"
            ) from None
        self.network, self.half = network.eval().requires_grad_(False), half
        self.mean, self.deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in _normalisation(source))
        takes = signature(network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    @torch.no_grad()
    def __call__(self, images: Tensor, height: int, width: int) -> Tensor:
        """(B, 3, H, W) -> (B, D, height, width), float32: the image is scaled to as many patches."""
        network, device = self.network.to(images.device), images.device
        x = ((images.float() + 1) / 2 - self.mean.to(device)) / self.deviation.to(device)
        size = (height * self.patch, width * self.patch)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with torch.autocast(device.type, self.half) if self.half else nullcontext():
            tokens = network(pixel_values=x, **self.options).last_hidden_state
        patches = tokens[:, -height * width :].float()  # what comes before stands for the whole image
        return patches.mT.unflatten(2, (height, width))


def _normalisation(source: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels in [0, 1] as a network takes them, ImageNet's where it brings none."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
        return processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError):
        return IMAGENET
