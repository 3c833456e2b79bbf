"""Priors p(z) to draw from: normal, a mixture of Gaussians, a swiss roll (Makhzani et al. 2015).

Each is a function of standard normal noise, as a posterior sample is, so that a training program which draws noise
by sample number draws the prior alike. The mixture and the roll lie in planes of two channels each, (0, 1), (2, 3)
..., independent of one another. All have zero mean and unit variance (of the roll: its two channels' average), so
that one scale fits latents of any of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

COMPONENTS = 10  # of the mixture: petals around the origin
PETAL = (1.4, 0.5, 0.1)  # distance of their centres, deviation along and across the radius, before scaling
TURNS, THICKNESS = 2.0, 0.01  # of the roll, whose outer radius is 1 before scaling


class Prior(NamedTuple):
    """A distribution of latents with any number of channels that is a multiple of `plane`.

    from_noise: standard normal noise (B, noise_channels, ...) -> latents (B, C, ...); each position is a draw of
        its own.
    plane, noise_of_plane: so many channels of latents are made of so many channels of noise.
    """

    from_noise: Callable[[Tensor], Tensor]
    plane: int
    noise_of_plane: int

    def noise_channels(self, channels: int) -> int:
        """Channels of the noise that `channels` of latents are made of. ValueError for no multiple of `plane`."""
        if channels < 1 or channels % self.plane:
            raise ValueError(f"channels: {channels}; allowed for this prior: multiples of {self.plane}")
        return channels // self.plane * self.noise_of_plane

    def sample(self, number: int, channels: int, generator: torch.Generator | None = None) -> Tensor:
        """`number` draws on the generator's device (the CPU without one): (number, channels), float32."""
        device = None if generator is None else generator.device
        shape = (number, self.noise_channels(channels))
        return self.from_noise(torch.randn(shape, generator=generator, device=device))


def mixture(noise: Tensor) -> Tensor:
    """(B, 3P, ...) -> (B, 2P, ...): in each plane one of ten petals, long along the radius, with equal chance."""
    chosen, along, across = noise.unflatten(1, (-1, 3)).unbind(2)
    petal = (torch.special.ndtr(chosen) * COMPONENTS).floor().clamp(max=COMPONENTS - 1)
    distance, length, width = PETAL
    angle = petal * (2 * math.pi / COMPONENTS)
    x, y = distance + length * along, width * across
    turned = torch.stack((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), dim=2)
    return turned.flatten(1, 2) / math.sqrt((distance**2 + length**2 + width**2) / 2)


def swiss_roll(noise: Tensor) -> Tensor:
    """(B, 3P, ...) -> (B, 2P, ...): in each plane a spiral r = s, angle = a s, with r^2 uniform and a little noise.

    Its mean is (4 / a^2, -2 / a), the integrals of 2 s^2 cos(a s) and 2 s^2 sin(a s), and E[r^2] = 1/2.
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
