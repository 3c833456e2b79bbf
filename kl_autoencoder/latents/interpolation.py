"""Interpolate, sample and edit latents: paths between two, draws from a Gaussian, attributes as directions.

Latents are raw, as `encode` returns and `decode` takes them.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..networks.distributions import LOGVAR_RANGE, DiagonalGaussian, at_least_float32
from .statistics import LatentStatistics

PARALLEL = 1e-4  # two latents count as parallel if the sine of the angle between them is at most this


def interpolate(a: Tensor, b: Tensor, steps: int, spherical: bool = False) -> Tensor:
    """Return `steps` latents on the path from `a` to `b`, both (C, h, w): (steps, C, h, w).

    The first is exactly `a`, the last exactly `b`. Linear: (1 - t) a + t b; spherical: `slerp`. Raises ValueError
    for fewer than 2 steps and for latents of different shapes.
    """
    if steps < 2:
        raise ValueError(f"steps: {steps}; allowed: at least 2")
    if a.shape != b.shape:
        raise ValueError(f"latents must be of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    way = slerp if spherical else torch.lerp
    return torch.stack([a, *(way(a, b, i / (steps - 1)) for i in range(1, steps - 1)), b])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985), sin((1-t)w)/sin(w) a + sin(t w)/sin(w) b, of latents of any shape.

    w is the angle between `a` and `b` as vectors of all their values; t is in [0, 1]. Two draws from a Gaussian of
    many dimensions are nearly orthogonal and of nearly equal length. Spherical interpolation keeps that length;
    halfway along a straight line it drops to 1/sqrt(2). Parallel or zero latents are interpolated linearly.
    """
    x, y = at_least_float32(a).flatten(), at_least_float32(b).flatten()
    angle = torch.acos((torch.dot(x, y) / (x.norm() * y.norm())).clamp(-1, 1))
    sine = angle.sin()
    if not sine > PARALLEL:  # negated, as sine is NaN if one of them is zero
        return torch.lerp(a, b, t)
    mixed = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / sine
    return mixed.view(a.shape).to(a.dtype)


def standard_normal(channels: int, height: int, width: int) -> DiagonalGaussian:
    """The prior N(0, I) of a variational autoencoder over latents (1, channels, height, width)."""
    return DiagonalGaussian(torch.zeros(1, 2 * channels, height, width))


def fitted(
    posteriors: Iterable[DiagonalGaussian], per: Literal["channel", "position"] = "channel"
) -> DiagonalGaussian:
    """Fit a Gaussian to draws from all the posteriors: a distribution over latents (1, C, h, w).

    per: "channel" fits one mean and variance for each channel, "position" one for each latent value. The variance
    is Var[z] = Var[mean] + E[variance], in float64. Raises ValueError for no posteriors and for latents of
    different shapes.
    """
    statistics = shape = None
    for posterior in posteriors:
        if shape not in (None, posterior.mean.shape[1:]):
            raise ValueError(
                f"latents of different shapes: {tuple(shape)} and {tuple(posterior.mean.shape[1:])}"
            )
        shape = posterior.mean.shape[1:]
        mean, var = posterior.mean, posterior.var
        if per == "position":  # treat every value as a channel of its own
            mean, var = mean.flatten(1)[..., None, None], var.flatten(1)[..., None, None]
        statistics = statistics or LatentStatistics(mean.shape[1])
        statistics.update(mean, var)
    if statistics is None:
        raise ValueError("no latents to fit a Gaussian to")
    logvar = (2 * statistics.std.log()).clamp(*LOGVAR_RANGE)
    fields = [
        v.view(shape if per == "position" else (-1, 1, 1)).expand(shape) for v in (statistics.mean, logvar)
    ]
    return DiagonalGaussian(torch.cat(fields)[None].float())


def mean_latent(posteriors: Iterable[DiagonalGaussian]) -> Tensor:
    """The mean of the posteriors' modes: (1, C, h, w).

    The difference between the means with and without an attribute is its direction (Larsen et al. 2016).
    """
    return fitted(posteriors, "position").mean
