"""`Bottleneck`: what lies between encoder and decoder, and `Code`, what it returns in training."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distributions import DiagonalGaussian


@dataclass
class Code:
    """The output of a bottleneck.

    z: (B, C, h, w), what the decoder reads. penalties: name -> (B,), in nats per pixel dimension. facts: a function
    that returns scalars to log by name; it is called only in steps that are logged.
    """

    z: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    facts: Callable[[], dict[str, Tensor]] = dict


class PointPosterior:
    """The posterior of an encoder without noise: all of it lies at one point, `mean` (B, C, h, w)."""

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
    """From what the encoder returns, h (B, encoder_channels, h, w), to latents z (B, C, h, w).

    `forward` is what training calls; `posterior` is what a finished model needs. The defaults are those of a
    bottleneck with a Gaussian's moments in h.
    """

    def encoder_channels(self, latent_channels: int) -> int:
        """The channels that it wants of the encoder for `latent_channels` of latents."""
        return 2 * latent_channels

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape of the standard normal noise that an image needs, for latents of the shape (C, h, w)."""
        return latent

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        """h (B, encoder_channels, h, w), noise (B, *noise_shape), D = `dimensions` pixel values -> Code."""
        raise NotImplementedError

    def posterior(self, h: Tensor) -> DiagonalGaussian | PointPosterior:
        """The distribution of latents that h stands for."""
        return DiagonalGaussian(h)

    def begin_step(self, step: int) -> None:
        """Called before the first forward of a step of training, counted from 0: schedules."""

    def end_step(self, gathered: Callable[[Tensor], Tensor]) -> None:
        """Called after a step of training. gathered: (N, ...) of each rank -> that of all ranks, in their order."""

    def wants_start(self) -> int:
        """How many vectors of h it has to see before the first step; 0: none."""
        return 0

    def start(self, h: Tensor, seed: int) -> None:
        """Begin with h (N, C) of the first images of the training data, the same on every rank."""


class Discrete(Bottleneck):
    """A bottleneck whose latents are `codes` vectors: each position of an image is one number below `codes`."""

    codes: int

    def indices(self, h: Tensor) -> Tensor:
        """h (B, encoder_channels, h, w) -> (B, h, w), int64, below `codes`."""
        raise NotImplementedError

    def from_indices(self, indices: Tensor) -> Tensor:
        """The inverse of `indices` up to rounding: (B, h, w) -> latents (B, C, h, w)."""
        raise NotImplementedError

    def posterior(self, h: Tensor) -> PointPosterior:
        return PointPosterior(self.from_indices(self.indices(h)).to(h.dtype))


def code_facts(indices: Tensor, codes: int) -> dict[str, Tensor]:
    """Perplexity, exp of the entropy of the codes' frequencies, and the share of the codes that are used."""
    counts = torch.bincount(indices.flatten(), minlength=codes).double()
    p = counts / counts.sum()
    return {
        "codes/perplexity": torch.exp(-(p * p.clamp(min=1e-300).log()).sum()).float(),
        "codes/used": (counts > 0).float().mean(),
    }


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value`, with the gradient of the identity in `source` (Bengio et al. 2013)."""
    return source + (value - source).detach()
