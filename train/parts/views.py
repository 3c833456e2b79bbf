"""Views: changes to the latents, and to the images they stand for, between encoder and decoder.

A view is a callable (z, images, draws) -> (z, images), used in training alone. It may have two further methods:

- `at_encoder(images, multiple, draws) -> images`: the input of the encoder, with sides that are multiples of
  `multiple`, the network's downsampling, and at most those of `images`;
- `smallest_side(resolution, multiple) -> int`: the side of the smallest images that it makes of such crops.
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
    """Normal noise on the latents: the decoder learns to bear errors of diffusion and rounding (RAE uses 0.8)."""

    kind: Literal["noise"] = choice("noise", "normal noise of a deviation that is drawn for each image")
    low: float = key(0.0, "smallest deviation, in the units of the raw latents", low=0, high=1e6)
    high: float = key(
        0.5, "largest deviation; the KL keeps latents from growing away from it", low=0, high=1e6
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
