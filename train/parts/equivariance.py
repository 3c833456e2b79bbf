"""The view `equivariance`: the decoder gets transformed latents and has to return the transformed images.

EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509): latents that turn and scale with their images are easier for a
diffusion model to learn. With scaling only, this is scale equivariance (Skorokhodov et al. 2025, arXiv 2502.14831).
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
    """Turn and scale latents and images alike. The defaults are EQ-VAE's, for latents with sides of 32."""

    kind: Literal["equivariance"] = choice(
        "equivariance", "latents and images are turned and scaled down alike"
    )
    probability: float = key(0.5, "share of the steps in which latents are turned and scaled", low=0, high=1)
    rotate: bool = key(True, "turn each image by 90, 180 or 270 degrees; false: only scale")
    smallest_scale: float = key(0.25, "smallest factor that images are scaled by", above=0, high=1)
    largest_scale: float = key(
        0.96875, "largest factor; smallest_scale and largest_scale 1: only turn", above=0, high=1
    )
    low_resolution: float = key(
        0.25,
        "share of the other steps in which the encoder itself gets smaller images, to keep encoding them well",
        low=0,
        high=1,
    )
    smallest_side: int = key(
        32,
        "smallest side of a scaled image in pixels; LPIPS needs 31 with alex, 16 with vgg",
        low=16,
        high=4096,
    )

    def __post_init__(self):
        if self.smallest_scale > self.largest_scale:
            raise ValueError(
                f"loss.view.smallest_scale: {self.smallest_scale}; allowed: at most loss.view.largest_scale, "
                f"{self.largest_scale}"
            )


@VIEWS.register(EquivarianceConfig)
class Equivariance:
    """Draws for each step whether to transform, and the scale; for each image, how far it is turned.

    The scale is uniform over those from `smallest_scale` to `largest_scale` that give latents of whole sides:
    {8..31}/32 for sides of 32, as published. It depends only on the seed and the step's number, and so is the same
    on every rank, in every micro-batch and after a restart; a turn depends only on the seed and the sample's
    number. Therefore two ranks give the gradients of one process with the doubled batch, and a continued run is
    bit-equal on a CPU.

    The likelihood of a smaller image counts as much as that of a whole one, since it is a mean over pixels; the KL
    is not changed. Each step may have another image size, for which `train.compile` compiles the networks again;
    that takes minutes.
    """

    def __init__(self, config: EquivarianceConfig, run=None):
        self.config = config

    def at_encoder(self, images: Tensor, multiple: int, draws: Draws) -> Tensor:
        """The encoder's input: the images (B, C, H, H), scaled down if this is a step of low resolution.

        multiple: the network's downsampling, of which the result's sides are multiples.
        """
        numbers = draws.of_step()
        if self._kind_of_step(numbers) != "low resolution":
            return images
        return resized(images, multiple * self._side(numbers, images.shape[-1], multiple))

    def __call__(self, z: Tensor, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        numbers = draws.of_step()
        if self._kind_of_step(numbers) != "transformed":
            return z, images
        multiple = images.shape[-1] // z.shape[-1]
        side = self._side(numbers, images.shape[-1], multiple)
        z, images = resized(z, side), resized(images, multiple * side)
        if self.config.rotate:
            turns = draws.whole(1, 3)
            z, images = turned(z, turns), turned(images, turns)
        return z, images

    def smallest_side(self, resolution: int, multiple: int) -> int:
        """The smallest side, in pixels, of the images that it makes of square crops of side `resolution`.

        multiple: the network's downsampling. Raises ValueError if no scale between the two gives latents of whole
        sides.
        """
        smallest, largest = self._sides(resolution, multiple)
        if smallest > largest:
            raise ValueError(
                f"loss.view.largest_scale: {self.config.largest_scale}; allowed for data.resolution={resolution}: "
                f"more, so that a multiple of {multiple} pixels lies between both scales, "
                f"from smallest_side={self.config.smallest_side} on"
            )
        return smallest * multiple

    def _kind_of_step(self, numbers: np.random.Generator) -> str:
        transforms, shrinks = numbers.uniform(size=2)
        if transforms < self.config.probability:
            return "transformed"
        return "low resolution" if shrinks < self.config.low_resolution else "unchanged"

    def _side(self, numbers: np.random.Generator, resolution: int, multiple: int) -> int:
        """Draw the side of this step's latents; `resolution` is that of the whole images."""
        smallest, largest = self._sides(resolution, multiple)
        return int(numbers.integers(smallest, largest + 1))

    def _sides(self, resolution: int, multiple: int) -> tuple[int, int]:
        """The smallest and the largest side of latents that the scales and `smallest_side` allow."""
        whole = resolution // multiple
        smallest = max(
            math.ceil(self.config.smallest_scale * whole), math.ceil(self.config.smallest_side / multiple)
        )
        return smallest, math.floor(self.config.largest_scale * whole)


def resized(x: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, H) -> (B, C, side, side), bilinear and antialiased, in the dtype of x."""
    if side == x.shape[-1]:
        return x
    return F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True).to(x.dtype)


def turned(x: Tensor, turns: list[int]) -> Tensor:
    """Turn each image of x, (B, C, H, H), counterclockwise by `turns` (length B) right angles.

    The result is in channels_last memory format, as the networks expect it.
    """
    images = [one.rot90(k, (-2, -1)) for one, k in zip(x, turns, strict=True)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)
