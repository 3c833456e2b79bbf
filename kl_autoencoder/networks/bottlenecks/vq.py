"""Vector quantisation: each latent vector is replaced by the nearest one of a code book (VQ-VAE).

Van den Oord et al. 2017, whose sections and equations are cited below. vector-quantize-pytorch is not used because
it draws its k-means start and the replacements of dead codes from torch's global generator, so that they depend on
the number of ranks and on restarts, and because it moves the code book in each forward pass, so that micro-batches
are not the same as one batch. Here all of this depends only on the images of a step.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Code, Discrete, code_facts, straight_through
from .kmeans import kmeans, nearest

CANDIDATES = 8  # vectors of each image that may replace dead codes in a step
START_VECTORS = 32  # for each code, in the initial k-means


class VectorQuantizer(Discrete):
    """Replace each latent vector h by the nearest code e, with a straight-through gradient.

    Args:
        codes: number of codes.
        codebook: how codes are learned. "ema": by moving them to the mean of their latents, with exponential moving
            averages (appendix A.1); "gradient": by the gradient of |sg(h) - e|^2 (equation 3).
        commitment: weight of the penalty (h - sg(e))^2, a mean over an image's latents (beta of equation 3).
        decay: of the moving averages.
        revive_below: with "ema", a code with an average count of latents a step below this is dead: it and its
            averages are replaced by a latent of the step. 0: never.
    """

    def __init__(
        self,
        latent_channels: int,
        codes: int = 512,
        codebook: Literal["ema", "gradient"] = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.5,
    ):
        super().__init__()
        self.codes, self.commitment = codes, commitment
        self.decay, self.revive_below = decay, revive_below
        vectors = torch.randn(codes, latent_channels)
        if codebook == "gradient":
            self.codebook = nn.Parameter(vectors)
        else:
            self.register_buffer("codebook", vectors)
            self.register_buffer("counts", torch.ones(codes))
            self.register_buffer("sums", vectors.clone())
        self.register_buffer("started", torch.zeros(()))
        self.learns_by_averages = codebook == "ema"
        # For each micro-batch of the step: counts, sums, candidates, and noise that puts these in order.
        self._micro_batches: list[tuple[Tensor, ...]] = []

    def encoder_channels(self, latent_channels: int) -> int:
        return latent_channels

    def noise_shape(self, latent: tuple[int, int, int]) -> tuple[int, ...]:
        return (CANDIDATES,)

    def forward(self, h: Tensor, noise: Tensor, dimensions: int) -> Code:
        indices = self.indices(h)
        quantized = self.from_indices(indices)
        distance = (h.float() - quantized.detach()).square().mean(dim=(1, 2, 3))
        penalties = {"commitment": self.commitment * distance}
        if self.learns_by_averages:
            if self.training and torch.is_grad_enabled():
                self._observe(h, indices, noise)
        else:
            penalties["codebook"] = (h.detach().float() - quantized).square().mean(dim=(1, 2, 3))
        z = straight_through(quantized.detach(), h.float())
        return Code(z.to(h.dtype), penalties, lambda: code_facts(indices, self.codes))

    def indices(self, h: Tensor) -> Tensor:
        vectors = h.float().movedim(1, -1)
        return nearest(vectors.flatten(0, 2), self.codebook.detach().float()).view(vectors.shape[:3])

    def from_indices(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    # ---------------------------------------------------------------- moving the code book

    @torch.no_grad()
    def _observe(self, h: Tensor, indices: Tensor, noise: Tensor) -> None:
        """Keep what `end_step` needs of a micro-batch.

        Candidates are latents at places drawn uniformly, by the noise.
        """
        vectors = h.float().movedim(1, -1).flatten(1, 2)  # (B, h*w, C)
        counts = torch.bincount(indices.flatten(), minlength=self.codes).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices.flatten(), vectors.flatten(0, 1))
        places = (torch.special.ndtr(noise) * vectors.shape[1]).long().clamp(max=vectors.shape[1] - 1)
        candidates = vectors.gather(1, places.unsqueeze(-1).expand(-1, -1, vectors.shape[2]))
        self._micro_batches.append((counts, sums, candidates.flatten(0, 1), noise.flatten()))

    @torch.no_grad()
    def end_step(self, gathered: Callable[[Tensor], Tensor]) -> None:
        """Move the code book by all latents of the step: those of all micro-batches and ranks.

        If any of them is not finite, the code book stays as it is.
        """
        if not self._micro_batches:
            return
        counts, sums, candidates, order = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        counts = gathered(torch.stack(counts)).sum(dim=0)
        sums = gathered(torch.stack(sums)).sum(dim=0)
        candidates, order = gathered(torch.cat(candidates)), gathered(torch.cat(order))
        if not sums.isfinite().all():
            return
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = (self.counts < self.revive_below).nonzero().flatten()[: len(candidates)]
        self.sums[dead] = self.revive_below * candidates[order.argsort()[: len(dead)]]
        self.counts[dead] = self.revive_below
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-12).unsqueeze(1))

    def wants_start(self) -> int:
        return 0 if self.started else START_VECTORS * self.codes

    @torch.no_grad()
    def start(self, h: Tensor, seed: int) -> None:
        """Set the code book to the k-means centres of latents h (N, C)."""
        centres, sizes = kmeans(h.float(), self.codes, seed)
        self.codebook.copy_(centres)
        if self.learns_by_averages:
            share = sizes / sizes.sum()
            self.counts.copy_((share * self.codes).clamp(min=self.revive_below))
            self.sums.copy_(centres * self.counts.unsqueeze(1))
        self.started.fill_(1)
