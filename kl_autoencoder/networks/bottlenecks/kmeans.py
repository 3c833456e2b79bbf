"""k-means (Lloyd 1982) of latents, the start of a code book. The same on every rank, in plain torch."""

import torch
from torch import Tensor

ITERATIONS = 20


def kmeans(vectors: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, C) -> centres (clusters, C) and the number of vectors of each, (clusters,).

    A cluster without vectors stays where it is.
    """
    centres = spread(vectors, clusters, torch.Generator().manual_seed(seed))
    for _ in range(ITERATIONS):
        owner = nearest(vectors, centres)
        counts = torch.bincount(owner, minlength=clusters).to(vectors.dtype)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centres)
    return centres, counts


def spread(vectors: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` of the vectors (N, C), each drawn in proportion to its squared distance from those before.

    k-means++ (Arthur & Vassilvitskii 2007). Vectors repeat where there are fewer different ones than `number`.
    """
    draws = torch.rand(number, generator=generator, dtype=torch.float64)
    distances = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    chosen = []
    for draw in draws.tolist():
        places = distances.cumsum(0)
        place = torch.searchsorted(places, draw * places[-1], right=True).clamp(max=len(vectors) - 1)
        chosen.append(vectors[place])
        apart = (vectors - chosen[-1]).square().sum(dim=1).double()
        distances = apart if len(chosen) == 1 else torch.minimum(distances, apart)
    return torch.stack(chosen)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The row of `codebook` (K, C) nearest to each of `vectors` (N, C): (N,), int64."""
    scores = codebook.square().sum(dim=1) - 2 * vectors @ codebook.T  # |v - e|^2 without |v|^2
    return scores.argmin(dim=1)
