"""Interpolate, sample and edit latents: paths between two, draws from a Gaussian, attributes as directions.

Latents are raw (B, C, h, w) here, as `encode` gives and `decode` takes them.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..networks.distributions import LOGVAR_RANGE, DiagonalGaussian, at_least_float32
from .statistics import LatentStatistics

PARALLEL = 1e-4  # sine of the angle below which two latents count as of one direction


def interpolate(a: Tensor, b: Tensor, steps: int, spherical: bool = False) -> Tensor:
    """Latents (C, h, w) twice -> (steps, C, h, w) from `a` to `b`, those two exactly. ValueError for steps < 2.

    Linear: (1 - t) a + t b. Spherical (Shoemake 1985), see `slerp`.
    """
    if steps < 2:
        raise ValueError(f"steps: {steps}; allowed: at least 2")
    if a.shape != b.shape:
        raise ValueError(f"latents must be of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    way = slerp if spherical else torch.lerp
    return torch.stack([a, *(way(a, b, i / (steps - 1)) for i in range(1, steps - 1)), b])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1-t)w)/sin(w) a + sin(t w)/sin(w) b, w the angle between `a` and `b` as vectors of all their values.

    Two draws from a Gaussian of many dimensions are nearly orthogonal and of nearly one length. This keeps that
    length, where the straight line passes through draws that are 1/sqrt(2) as long. Linear for one direction.
    """
    x, y = at_least_float32(a).flatten(), at_least_float32(b).flatten()
    angle = torch.acos((torch.dot(x, y) / (x.norm() * y.norm())).clamp(-1, 1))
    sine = angle.sin()
    if not sine > PARALLEL:  # nor if one of them is zero
        return torch.lerp(a, b, t)
    mixed = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / sine
    return mixed.view(a.shape).to(a.dtype)


def standard_normal(channels: int, height: int, width: int) -> DiagonalGaussian:
    """The prior N(0, I) of a variational autoencoder, of latents (1, C, h, w)."""
    return DiagonalGaussian(torch.zeros(1, 2 * channels, height, width))


def fitted(
    posteriors: Iterable[DiagonalGaussian], per: Literal["channel", "position"] = "channel"
) -> DiagonalGaussian:
    """The Gaussian with the mean and variance that draws from all the posteriors have: moments (1, 2C, h, w).

    `per` channel: one mean and variance for each channel; per position: for each latent value, what a photograph
    has at that place. Var[z] = Var[mean] + E[variance], in float64. ValueError for no posteriors and for latents
    of different shapes.
    """
    statistics = shape = None
    for posterior in posteriors:
        if shape not in (None, posterior.mean.shape[1:]):
            raise ValueError(
                f"latents of different shapes: {tuple(shape)} and {tuple(posterior.mean.shape[1:])}"
            )
        shape = posterior.mean.shape[1:]
        mean, var = posterior.mean, posterior.var
        if per == "position":  # every value as a channel
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
    """The mean of the posteriors' modes: (1, C, h, w). Differences of two are attributes (Larsen et al. 2016)."""
    return fitted(posteriors, "position").mean
