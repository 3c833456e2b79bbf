"""Bottlenecks without noise: those of the plain and of the adversarial autoencoder."""

from torch import Tensor

from ..priors import PRIORS, Prior
from .base import Bottleneck, Code, PointPosterior


class PlainBottleneck(Bottleneck):
    """Latents are the encoder's output, unchanged.

    Args:
        sparsity: weight of the penalty mean |z|; above 0 the autoencoder is a sparse one.
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
    """The adversarial autoencoder's: a discriminator tells latents from draws of a prior (Makhzani et al. 2015).

    The discriminator and its training step are in `train`; a trained model keeps only the prior's name.

    Args:
        prior: "normal", "mixture" or "swiss_roll", see `networks.priors`.

    Raises ValueError for another prior, and for a number of latent channels that the prior cannot have.
    """

    def __init__(self, latent_channels: int, prior: str = "normal"):
        super().__init__(latent_channels)
        if prior not in PRIORS:
            raise ValueError(f"bottleneck.prior: {prior!r}; allowed: {', '.join(PRIORS)}")
        self.prior: Prior = PRIORS[prior]
        self.noise = self.prior.noise_channels(latent_channels)

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        """Return the shape of the noise for one draw of the prior, which an image's latents are compared with."""
        return (self.noise, *latent[1:])
