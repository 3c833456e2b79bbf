"""Priors p(z) to draw from: normal, a mixture of Gaussians, a swiss roll (Makhzani et al. 2015).

A draw is a function of standard normal noise, as a sample of a posterior is: training draws the noise of both by
the number of the sample. The mixture and the swiss roll are distributions in a plane of two channels; planes (0,
1), (2, 3) ... are independent of one another. All have zero mean and unit variance (the swiss roll: on average over
its two channels), so that latents of all of them have the same scale.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

COMPONENTS = 10  # of the mixture, arranged as petals around the origin
PETAL = (1.4, 0.5, 0.1)  # before scaling: distance of a centre from 0, deviation along and across the radius
TURNS, THICKNESS = 2.0, 0.01  # of the roll, before scaling: its outer radius is 1; deviation of its noise


class Prior(NamedTuple):
    """A distribution of latents (B, C, ...), where C is any multiple of `plane`.

    from_noise: standard normal noise (B, noise_channels(C), ...) -> latents (B, C, ...), independent at each
    position. plane, noise_of_plane: `noise_of_plane` channels of noise become `plane` channels of latents.
    """

    from_noise: Callable[[Tensor], Tensor]
    plane: int
    noise_of_plane: int

    def noise_channels(self, channels: int) -> int:
        """Return the channels of noise for `channels` of latents.

        ValueError unless these are a multiple of `plane`.
        """
        if channels < 1 or channels % self.plane:
            raise ValueError(f"channels: {channels}; allowed for this prior: multiples of {self.plane}")
        return channels // self.plane * self.noise_of_plane

    def sample(self, number: int, channels: int, generator: torch.Generator | None = None) -> Tensor:
        """Return `number` draws, on the generator's device (without one, the CPU): (number, channels), float32."""
        device = None if generator is None else generator.device
        shape = (number, self.noise_channels(channels))
        return self.from_noise(torch.randn(shape, generator=generator, device=device))


def mixture(noise: Tensor) -> Tensor:
    """Noise (B, 3P, ...) -> (B, 2P, ...): in each of P planes one of ten petals, Gaussians of equal probability."""
    chosen, along, across = noise.unflatten(1, (-1, 3)).unbind(2)
    petal = (torch.special.ndtr(chosen) * COMPONENTS).floor().clamp(max=COMPONENTS - 1)
    distance, length, width = PETAL
    angle = petal * (2 * math.pi / COMPONENTS)
    x, y = distance + length * along, width * across
    turned = torch.stack((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), dim=2)
    return turned.flatten(1, 2) / math.sqrt((distance**2 + length**2 + width**2) / 2)


def swiss_roll(noise: Tensor) -> Tensor:
    """Noise (B, 3P, ...) -> (B, 2P, ...): in each of P planes a spiral with a little noise, centred and scaled.

    The spiral is r = s, angle = a s, with s^2 uniform in [0, 1]. So E[r^2] = 1/2, and its mean, the integrals of
    2 s^2 cos(a s) and 2 s^2 sin(a s) over [0, 1], is (4 / a^2, -2 / a) for a = 2 pi TURNS.
    """
    place, *around = noise.unflatten(1, (-1, 3)).unbind(2)
    radius, a = torch.special.ndtr(place).sqrt(), 2 * math.pi * TURNS
    spiral = torch.stack((radius * (a * radius).cos(), radius * (a * radius).sin()), dim=2)
    mean = (4 / a**2, -2 / a)
    centred = torch.stack([axis - m for axis, m in zip(spiral.unbind(2), mean, strict=True)], dim=2)
    variance = (0.5 - sum(m**2 for m in mean)) / 2 + THICKNESS**2
    return ((centred + THICKNESS * torch.stack(around, dim=2)) / math.sqrt(variance)).flatten(1, 2)


PRIORS = {
    "normal": Prior(lambda noise: noise, 1, 1),
    "mixture": Prior(mixture, 2, 3),
    "swiss_roll": Prior(swiss_roll, 2, 3),
}
