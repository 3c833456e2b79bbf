"""The view `equivariance`: the decoder is given transformed latents, and must give the transformed images.

EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509): latents that are turned and scaled as their images are have less of
what a diffusion model has trouble with. Scaling alone is scale equivariance (Skorokhodov et al. 2025, arXiv
2502.14831).
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import choice, key, section
from .draws import Draws
from .registry import VIEWS


@section
class EquivarianceConfig:
    """Latents and images, turned and scaled alike. The defaults are EQ-VAE's, for latents with sides of 32."""

    kind: Literal["equivariance"] = choice(
        "equivariance", "latents and images are turned and scaled down alike"
    )
    probability: float = key(0.5, "of a step in which they are", low=0, high=1)
    rotate: bool = key(True, "each image by 90, 180 or 270 degrees; false: scale alone")
    smallest_scale: float = key(0.25, "smallest scale of a step's images", above=0, high=1)
    largest_scale: float = key(0.96875, "largest scale; 1 for both: turn alone", above=0, high=1)
    low_resolution: float = key(
        0.25,
        "share of the other steps in which the encoder itself is given smaller images, so that it keeps them",
        low=0,
        high=1,
    )
    smallest_side: int = key(
        32, "pixels below which no image is scaled; LPIPS of alex needs 31, vgg 16", low=16, high=4096
    )

    def __post_init__(self):
        if self.smallest_scale > self.largest_scale:
            raise ValueError(
                f"loss.view.smallest_scale: {self.smallest_scale}; allowed: at most loss.view.largest_scale, "
                f"{self.largest_scale}"
            )


@VIEWS.register(EquivarianceConfig)
class Equivariance:
    """Draws what happens to a step, and its scale, once for all its images; a turn for each image.

    The scale is one that gives latents of whole sides, uniformly over those from `smallest_scale` to
    `largest_scale`: of sides of 32 the published {8..31}/32. It is a function of the seed and the step's number,
    the same on every rank, in every micro-batch and after a restart; a turn is one of the seed and the sample. So
    two ranks give the gradients of one process with the doubled batch, and a run continues bit-equal on a CPU.

    The likelihood of a smaller image counts as that of a whole one (a mean over its pixels), the KL as ever.
    Images of a step have a size of their own: with `train.compile` the networks are compiled again for sizes that
    vary, which takes minutes.
    """

    def __init__(self, config: EquivarianceConfig, run=None):
        self.config = config

    def at_encoder(self, images: Tensor, multiple: int, draws: Draws) -> Tensor:
        """The images (B, 3, H, H) themselves, or in a step of low resolution smaller ones."""
        numbers = draws.of_step()
        if self._what(numbers) != "low resolution":
            return images
        return resized(images, multiple * self._side(numbers, images.shape[-1], multiple))

    def __call__(self, z: Tensor, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        numbers = draws.of_step()
        if self._what(numbers) != "transformed":
            return z, images
        multiple = images.shape[-1] // z.shape[-1]
        side = self._side(numbers, images.shape[-1], multiple)
        z, images = resized(z, side), resized(images, multiple * side)
        if self.config.rotate:
            turns = draws.whole(1, 3)
            z, images = turned(z, turns), turned(images, turns)
        return z, images

    def smallest_side(self, resolution: int, multiple: int) -> int:
        """Of the images that are made of crops of `resolution`. Raises ValueError if no scale is allowed."""
        smallest, largest = self._sides(resolution, multiple)
        if smallest > largest:
            raise ValueError(
                f"loss.view.largest_scale: {self.config.largest_scale}; allowed for data.resolution={resolution}: "
                f"more, so that a multiple of {multiple} pixels lies between both scales, "
                f"from smallest_side={self.config.smallest_side} on"
            )
        return smallest * multiple

    def _what(self, numbers: np.random.Generator) -> str:
        transforms, shrinks = numbers.uniform(size=2)
        if transforms < self.config.probability:
            return "transformed"
        return "low resolution" if shrinks < self.config.low_resolution else "as it is"

    def _side(self, numbers: np.random.Generator, resolution: int, multiple: int) -> int:
        """Of the latents of this step."""
        smallest, largest = self._sides(resolution, multiple)
        return int(numbers.integers(smallest, largest + 1))

    def _sides(self, resolution: int, multiple: int) -> tuple[int, int]:
        """The least and the largest side of latents that are allowed."""
        whole = resolution // multiple
        smallest = max(
            math.ceil(self.config.smallest_scale * whole), math.ceil(self.config.smallest_side / multiple)
        )
        return smallest, math.floor(self.config.largest_scale * whole)


def resized(x: Tensor, side: int) -> Tensor:
    """(B, C, H, H) -> (B, C, side, side), in the type of x; with a filter as wide as the scale asks for."""
    if side == x.shape[-1]:
        return x
    return F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True).to(x.dtype)


def turned(x: Tensor, turns: list[int]) -> Tensor:
    """(B, C, H, H) with each image turned by so many right angles, in the memory format of the networks."""
    images = [one.rot90(k, (-2, -1)) for one, k in zip(x, turns, strict=True)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)
