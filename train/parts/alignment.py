"""The term `alignment` of VA-VAE (Yao et al. 2025, arXiv 2501.01423): latents aligned with frozen features.

A learned matrix projects the latent vector at each position to the space of a vision transformer's patch features
(DINOv2 by default). The loss makes this projection point in the direction of the feature at the same position, and
makes the cosine between the projections at any two positions of an image that between their features.
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

# mean and standard deviation of ImageNet's pixels, by which most of these networks expect images normalised
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@section
class AlignmentConfig:
    """Align latents with features by a fixed weight; VA-VAE multiplies it by |grad nll| / |grad alignment|."""

    kind: Literal["alignment"] = choice(
        "alignment",
        "align latents with the features of a frozen network, in direction and in pairwise cosines",
    )
    features: str = key(
        "facebook/dinov2-large",
        "that network: folder or hub id of a vision transformer that transformers loads",
    )
    weight: float = key(0.1, "of the term", above=0, high=1e6)
    cosine_margin: float = key(
        0.5, "cosines between latent and feature above 1 minus this cost nothing", low=0, high=2
    )
    distance_margin: float = key(
        0.25,
        "the cosine of two positions may differ by this from that of their features at no cost",
        low=0,
        high=2,
    )


@TERMS.register(AlignmentConfig)
def alignment(config: AlignmentConfig, run) -> Term:
    """Build the term. Raises ValueError if the network cannot be loaded or the encoder is not trained."""
    if run.train.decoder_only:
        raise ValueError(
            "loss.terms: alignment with train.decoder_only; allowed: where the encoder is trained, too"
        )
    network = FrozenFeatures(config.features, HALF_TYPES.get(run.train.mixed_precision))

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
    """The sum of VA-VAE's marginal cosine and marginal distance matrix losses (sections 3.2.1 and 3.2.2).

    projected, features: (B, D, h, w). Returns a scalar, float32. It is at least 0, and 0 if projection and feature
    have the same direction at each position.
    """
    a, b = (F.normalize(x.float().flatten(2), dim=1) for x in (projected, features))  # (B, D, h*w)
    cosine = F.relu(1 - cosine_margin - (a * b).sum(dim=1)).mean()
    differences = (a.mT @ a - b.mT @ b).abs()
    return cosine + F.relu(differences - distance_margin).mean()


class FrozenFeatures:
    """The patch features of a frozen vision transformer for images in [-1, 1], on the grid of the latents.

    source: a folder or hub id. half: the dtype to compute in, None for float32. width: D, channels of the features.
    Raises ValueError if the network cannot be loaded or has no patches, and MissingExtra without transformers.
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
        """Images (B, 3, H, W) -> features (B, D, height, width), float32.

        The images are scaled to height x width patches, so that each latent position has a feature.
        """
        network, device = self.network.to(images.device), images.device
        x = ((images.float() + 1) / 2 - self.mean.to(device)) / self.deviation.to(device)
        size = (height * self.patch, width * self.patch)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with torch.autocast(device.type, self.half) if self.half else nullcontext():
            tokens = network(pixel_values=x, **self.options).last_hidden_state
        patches = tokens[:, -height * width :].float()  # without the class and register tokens before them
        return patches.mT.unflatten(2, (height, width))


def _normalisation(source: str) -> tuple[list[float], list[float]]:
    """Mean and deviation by which a network expects pixels in [0, 1] to be normalised; by default ImageNet's."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
        return processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError):
        return IMAGENET
