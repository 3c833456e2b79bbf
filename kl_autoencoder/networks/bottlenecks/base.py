"""`Bottleneck`, the interface of what lies between encoder and decoder, and `Code`, its result in training."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distributions import DiagonalGaussian


@dataclass
class Code:
    """The output of a bottleneck.

    z: latents (B, C, h, w), the decoder's input. penalties: name -> (B,), in nats per pixel dimension. facts: a
    function that returns scalars to log, by name; it is called only in steps that are logged.
    """

    z: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    facts: Callable[[], dict[str, Tensor]] = dict


class PointPosterior:
    """The posterior of a deterministic encoder: all its probability is at one point, `mean` (B, C, h, w)."""

    def __init__(self, mean: Tensor):
        self.mean = mean

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        return self.mean


class Bottleneck(nn.Module):
    """Turns the encoder's output h (B, encoder_channels, h, w) into latents z (B, C, h, w).

    Training calls `forward`; a trained model calls `posterior`. The methods implemented here fit a bottleneck for
    which h holds the moments of a Gaussian.
    """

    def encoder_channels(self, latent_channels: int) -> int:
        """Return the number of channels that h must have for `latent_channels` of latents."""
        return 2 * latent_channels

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        """Return the shape of the standard normal noise for one image, whose latents have the shape (C, h, w)."""
        return latent

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        """h (B, encoder_channels, h, w), noise (B, *noise_shape) -> Code.

        dimensions: D, the number of values (pixels times channels) of an image, by which penalties are divided.
        """
        raise NotImplementedError

    def posterior(self, h: Tensor) -> DiagonalGaussian | PointPosterior:
        """Return the distribution of latents that h parametrises."""
        return DiagonalGaussian(h)

    def begin_step(self, step: int) -> None:
        """Called before the first `forward` of each training step, for schedules. step: counted from 0."""

    def end_step(self, gathered: Callable[[Tensor], Tensor]) -> None:
        """Called after each training step.

        gathered: tensor (N, ...) of this rank -> those of all ranks, in their order.
        """

    def wants_start(self) -> int:
        """Return how many vectors of h `start` needs before the first training step; 0: `start` is not called."""
        return 0

    def start(self, h: Tensor, seed: int) -> None:
        """Initialise from vectors h (N, C) of the first training images, the same on every rank."""


class Discrete(Bottleneck):
    """A bottleneck whose latents are codes: each position is one of `codes` vectors, given by its index."""

    codes: int

    def indices(self, h: Tensor) -> Tensor:
        """h (B, encoder_channels, h, w) -> indices (B, h, w), int64, from 0 to codes - 1."""
        raise NotImplementedError

    def from_indices(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w), int64 -> latents (B, C, h, w), the vectors of the codes."""
        raise NotImplementedError

    def posterior(self, h: Tensor) -> PointPosterior:
        return PointPosterior(self.from_indices(self.indices(h)).to(h.dtype))


def code_facts(indices: Tensor, codes: int) -> dict[str, Tensor]:
    """Return perplexity (exp of the entropy of the codes' frequencies) and the share of the codes that occur."""
    counts = torch.bincount(indices.flatten(), minlength=codes).double()
    p = counts / counts.sum()
    return {
        "codes/perplexity": torch.exp(-(p * p.clamp(min=1e-300).log()).sum()).float(),
        "codes/used": (counts > 0).float().mean(),
    }


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """Return `value`, whose gradient is passed on to `source` unchanged (Bengio et al. 2013)."""
    return source + (value - source).detach()
