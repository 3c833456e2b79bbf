"""Show latents as pictures: each channel in gray, and the first three principal components as colours."""

import torch
from torch import Tensor

DEVIATIONS = 2.5  # from the mean to black and to white; 1 in 80 values of a normal distribution lies outside


def channel_pictures(z: Tensor) -> Tensor:
    """Latents (1, C, h, w) -> (C, 3, h, w) in [-1, 1]: gray is a channel's mean, white 2.5 deviations above it."""
    return _levels(z[0].float())[:, None].expand(-1, 3, -1, -1)


def principal_components(z: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Principal components of a photograph's latents z (1, C, h, w), as h * w vectors of C channels.

    Returns the components (count, h, w) and the share of the variance of each (count,), in falling order; fewer
    than `count` if there are fewer channels. The sign of an eigenvector is arbitrary; here its entry of largest
    magnitude is positive.
    """
    vectors = z[0].double().flatten(1)  # (C, h * w)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    variances, directions = torch.linalg.eigh(vectors @ vectors.T / vectors.shape[1])
    variances, directions = variances.flip(0)[:count].clamp(min=0), directions.flip(1)[:, :count]
    largest = directions.abs().argmax(dim=0)
    directions = directions * directions.gather(0, largest[None]).sign()
    share = variances / vectors.square().mean(dim=1).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (directions.T @ vectors).view(-1, *z.shape[2:]).float(), share.float()


def component_picture(components: Tensor) -> Tensor:
    """Components (n, h, w) -> picture (1, 3, h, w) in [-1, 1]: the first as red, the second green, the third blue.

    If there are fewer than three, the others are 0 (middle gray).
    """
    levels = torch.zeros(3, *components.shape[1:])
    levels[: len(components)] = _levels(components[:3])
    return levels[None]


def _levels(channels: Tensor) -> Tensor:
    """Standardise each of (n, h, w) so that its mean is 0 and 2.5 deviations are 1, and clamp to [-1, 1]."""
    mean = channels.mean(dim=(1, 2), keepdim=True)
    deviation = channels.std(dim=(1, 2), keepdim=True, correction=0).clamp(min=1e-12)
    return ((channels - mean) / (DEVIATIONS * deviation)).clamp(-1, 1)
