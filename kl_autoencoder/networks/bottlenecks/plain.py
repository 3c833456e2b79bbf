"""Bottlenecks without noise: of the plain autoencoder, and of the adversarial one."""

from torch import Tensor

from ..priors import PRIORS, Prior
from .base import Bottleneck, Code, PointPosterior


class PlainBottleneck(Bottleneck):
    """Latents as the encoder returns them.

    Args:
        sparsity: weight of the mean |z|, which makes a sparse autoencoder.
    """

    def __init__(self, latent_channels: int, sparsity: float = 0.0):
        super().__init__()
        self.sparsity = sparsity

    def encoder_channels(self, latent_channels: int) -> int:
        return latent_channels

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        return (0,)

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        penalties = {}
        if self.sparsity:
            penalties["sparsity"] = self.sparsity * h.float().abs().mean(dim=(1, 2, 3))
        z = h.detach().float()
        return Code(h, penalties, lambda: {"latents/mean": z.mean(), "latents/std": z.std()})

    def posterior(self, h: Tensor) -> PointPosterior:
        return PointPosterior(h)


class AdversarialBottleneck(PlainBottleneck):
    """The adversarial autoencoder (Makhzani et al. 2015): a discriminator tells latents from draws of a prior.

    The discriminator and its step belong to training; what a finished model keeps is the prior's name.

    Args:
        prior: "normal", "mixture" or "swiss_roll", see `networks.priors`. ValueError for another one, and for a
            number of latent channels that it cannot have.
    """

    def __init__(self, latent_channels: int, prior: str = "normal"):
        super().__init__(latent_channels)
        if prior not in PRIORS:
            raise ValueError(f"bottleneck.prior: {prior!r}; allowed: {', '.join(PRIORS)}")
        self.prior: Prior = PRIORS[prior]
        self.noise = self.prior.noise_channels(latent_channels)

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        """That of the draws of the prior with which latents are compared."""
        return (self.noise, *latent[1:])
