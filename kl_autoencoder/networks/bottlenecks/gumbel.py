"""The discrete VAE: a categorical posterior over codes, relaxed by Gumbel-softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Code, Discrete, code_facts, straight_through


class GumbelSoftmax(Discrete):
    """Codes drawn from softmax(h) by the Gumbel-softmax relaxation (Jang et al. 2017; Maddison et al. 2017).

    Latents are the mean of the code vectors under y = softmax((h + g) / temperature), as in DALL-E's discrete VAE.
    The penalty `kl` is KL(softmax(h) || uniform) per pixel dimension, which `loss.kl` weights.

    Args:
        codes: number of codes.
        temperature, final_temperature, anneal_steps: the temperature falls geometrically from the first to the
        second
            in `anneal_steps` training steps.
        hard: use only the code with the largest y, with the gradient of y (straight through).
    """

    def __init__(
        self,
        latent_channels: int,
        codes: int = 128,
        temperature: float = 1.0,
        final_temperature: float = 0.5,
        anneal_steps: int = 1000,
        hard: bool = False,
    ):
        super().__init__()
        self.codes, self.hard = codes, hard
        self.temperatures, self.anneal_steps = (temperature, final_temperature), anneal_steps
        self.temperature = temperature
        self.codebook = nn.Parameter(torch.randn(codes, latent_channels))

    def encoder_channels(self, latent_channels: int) -> int:
        return self.codes

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        return (self.codes, *latent[1:])

    def begin_step(self, step: int) -> None:
        first, last = self.temperatures
        self.temperature = first * (last / first) ** min(1.0, step / max(1, self.anneal_steps))

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        logits = h.float()
        y = F.softmax((logits + gumbel(noise)) / self.temperature, dim=1)
        if self.hard:
            y = straight_through(F.one_hot(y.argmax(dim=1), self.codes).movedim(-1, 1).float(), y)
        z = torch.einsum("bkhw,kc->bchw", y, self.codebook)
        log_q = F.log_softmax(logits, dim=1)
        kl = (log_q.exp() * (log_q + math.log(self.codes))).sum(dim=(1, 2, 3)) / dimensions
        return Code(
            z.to(h.dtype), {"kl": kl}, lambda: code_facts(self.indices(h), self.codes) | self._facts()
        )

    def indices(self, h: Tensor) -> Tensor:
        return h.argmax(dim=1)

    def from_indices(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def _facts(self) -> dict[str, Tensor]:
        return {"codes/temperature": torch.tensor(self.temperature)}


def gumbel(noise: Tensor) -> Tensor:
    """Standard normal numbers -> standard Gumbel numbers, -log(-log u) with u = Phi(noise), the normal CDF."""
    return -torch.log(-torch.special.log_ndtr(noise.float()))
