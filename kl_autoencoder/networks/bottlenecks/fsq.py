"""Finite scalar quantisation: each channel of the latents is rounded to few values (Mentzer et al. 2023)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Code, Discrete, code_facts, straight_through

EPS = 1e-3  # widens the range a little, so that the outermost values are reached


class FiniteScalarQuantizer(Discrete):
    """Round channel i to `levels[i]` values in [-1, 1]; codes are the combinations of these. Nothing is learned.

    Args:
        levels: for each latent channel the number of its values, from 2 on; (8, 5, 5, 5) has 1000 codes (table 1).

    Raises ValueError for levels that do not fit latent_channels, are below 2 or have a product above 2^31.
    """

    def __init__(self, latent_channels: int, levels: Sequence[int] = (8, 5, 5, 5)):
        super().__init__()
        if len(levels) != latent_channels or min(levels) < 2 or math.prod(levels) > 2**31:
            raise ValueError(
                f"bottleneck.levels: {list(levels)}; allowed: {latent_channels} whole numbers from 2 on, as "
                "latent_channels says, with a product up to 2^31"
            )
        self.levels, self.codes = tuple(levels), math.prod(levels)
        self.register_buffer("level", torch.tensor(levels).view(-1, 1, 1), persistent=False)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("stride", torch.tensor(strides).view(-1, 1, 1), persistent=False)

    def encoder_channels(self, latent_channels: int) -> int:
        return latent_channels

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        return (0,)

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        bounded = self._bounded(h)
        z = straight_through(bounded.round(), bounded) / (self.level // 2)
        return Code(z.to(h.dtype), {}, lambda: code_facts(self.indices(h), self.codes))

    def indices(self, h: Tensor) -> Tensor:
        numbers = self._bounded(h).round().long() + self.level // 2  # 0 to level - 1
        return (numbers * self.stride).sum(dim=1)

    def from_indices(self, indices: Tensor) -> Tensor:
        numbers = indices.unsqueeze(1) // self.stride % self.level
        return (numbers - self.level // 2).float() / (self.level // 2)

    def _bounded(self, h: Tensor) -> Tensor:
        """Bound h to the range of `level` whole numbers around 0; an even `level` has one more below 0 than above.

        Section 3.1 of the paper; its listing has tan where atanh is used here, so that h = 0 gives 0.
        """
        half = (self.level - 1) * (1 + EPS) / 2
        offset = 0.5 * (self.level % 2 == 0)
        return torch.tanh(h.float() + torch.atanh(offset / half)) * half - offset
