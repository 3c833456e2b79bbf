"""Views: changes to the latents, and to the images that they decode to, between encoder and decoder.

A view is a callable (z, images, draws) -> (z, images), used in training only: z are the raw latents (B, C, h, w),
the images (B, 3, H, W) in [-1, 1], and what it returns are the latents to decode and the images that the decoder
should return. It may have two further methods:

- `at_encoder(images, multiple, draws) -> images`: the input of the encoder. Its sides are multiples of `multiple`,
the
  network's downsampling, and at most those of `images`.
- `smallest_side(resolution, multiple) -> int`: the smallest side, in pixels, of the images that it makes of crops
of
  side `resolution`.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..settings import choice, key, section
from .draws import Draws
from .registry import VIEWS

View = Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]


@section
class IdentityConfig:
    """Leave latents and images unchanged."""

    kind: Literal["identity"] = choice("identity", "latents as they are")


@VIEWS.register(IdentityConfig)
def identity(config: IdentityConfig, run) -> View:
    return lambda z, images, draws: (z, images)


@section
class NoiseConfig:
    """Normal noise on the latents: the decoder gets used to errors of diffusion and rounding. RAE uses 0.8."""

    kind: Literal["noise"] = choice(
        "noise", "normal noise on the latents, of a standard deviation drawn for each image"
    )
    low: float = key(0.0, "smallest standard deviation, in the units of the raw latents", low=0, high=1e6)
    high: float = key(
        0.5,
        "largest standard deviation; it counts because the KL keeps latents from growing",
        low=0,
        high=1e6,
    )

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"loss.view.low: {self.low}; allowed: at most loss.view.high, {self.high}")


@VIEWS.register(NoiseConfig)
def noise(config: NoiseConfig, run) -> View:
    def add(z: Tensor, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        deviation = draws.uniform(config.low, config.high).view(-1, 1, 1, 1)
        return z + (deviation * draws.normal(*z.shape[1:])).to(z.dtype), images

    return add
