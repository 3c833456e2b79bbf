"""k-means (Lloyd 1982) of latents, for an initial code book; in plain torch, the same on every rank."""

import torch
from torch import Tensor

ITERATIONS = 20


def kmeans(vectors: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, C) -> centres (clusters, C) and the number of vectors in each cluster, (clusters,).

    The centre of a cluster without vectors does not move. seed: of the k-means++ start.
    """
    centres = initial_centres(vectors, clusters, torch.Generator().manual_seed(seed))
    for _ in range(ITERATIONS):
        owner = nearest(vectors, centres)
        counts = torch.bincount(owner, minlength=clusters).to(vectors.dtype)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centres)
    return centres, counts


def initial_centres(vectors: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw `number` of the vectors (N, C), far apart: (number, C), k-means++ (Arthur & Vassilvitskii 2007).

    The probability of a vector is proportional to its squared distance to the nearest one drawn before. If fewer
    than `number` vectors are distinct, some are drawn repeatedly.
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
    """Return for each of `vectors` (N, C) the number of the nearest row of `codebook` (K, C): (N,), int64."""
    scores = codebook.square().sum(dim=1) - 2 * vectors @ codebook.T  # |v - e|^2 without |v|^2
    return scores.argmin(dim=1)
