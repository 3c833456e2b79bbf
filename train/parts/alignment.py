"""The term `alignment` of VA-VAE (Yao et al. 2025, arXiv 2501.01423): latents aligned with frozen features.

A learned matrix projects each latent to the space of a vision transformer's features (DINOv2 by default). The loss
pulls the projection to the direction of the feature of the same patch, and the cosine of any two places of an image
to that of their features.
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

# mean and deviation of ImageNet, on which most of these networks are trained
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@section
class AlignmentConfig:
    """Align latents with features. The weight is fixed; VA-VAE multiplies it by |grad nll| / |grad alignment|."""

    kind: Literal["alignment"] = choice(
        "alignment", "latents get the directions and cosines of frozen features"
    )
    features: str = key(
        "facebook/dinov2-large", "a folder or a hub id of a vision transformer that transformers loads"
    )
    weight: float = key(0.1, "of the term", above=0, high=1e6)
    cosine_margin: float = key(0.5, "a cosine that is less than this below 1 costs nothing", low=0, high=2)
    distance_margin: float = key(
        0.25, "by how much the cosine of two places may differ from that of their features", low=0, high=2
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

    projected, features: (B, D, h, w). Its minimum, 0, is reached where each pair of vectors points the same way.
    """
    a, b = (F.normalize(x.float().flatten(2), dim=1) for x in (projected, features))  # (B, D, h*w)
    cosine = F.relu(1 - cosine_margin - (a * b).sum(dim=1)).mean()
    differences = (a.mT @ a - b.mT @ b).abs()
    return cosine + F.relu(differences - distance_margin).mean()


class FrozenFeatures:
    """The patch features of a frozen vision transformer for images in [-1, 1], on the grid of the latents.

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
        """(B, 3, H, W) -> (B, D, height, width), float32: images are scaled to height x width patches."""
        network, device = self.network.to(images.device), images.device
        x = ((images.float() + 1) / 2 - self.mean.to(device)) / self.deviation.to(device)
        size = (height * self.patch, width * self.patch)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        with torch.autocast(device.type, self.half) if self.half else nullcontext():
            tokens = network(pixel_values=x, **self.options).last_hidden_state
        patches = tokens[:, -height * width :].float()  # tokens before these stand for the whole image
        return patches.mT.unflatten(2, (height, width))


def _normalisation(source: str) -> tuple[list[float], list[float]]:
    """Mean and deviation by which a network expects pixels in [0, 1] normalised; ImageNet's if it names none."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
        return processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError):
        return IMAGENET
