"""`Term`: a further term of the objective, beside reconstruction, KL, LPIPS and the adversarial term.

A term at the pixels is a scalar function of the reconstruction. Its gradient there is added to those of the other
terms, so that all of them together cost one backward pass through the autoencoder. A term at the latents is a
scalar function of the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Term:
    """A scalar that is added to the loss, times its weight.

    name: the name under which it is logged. at: "pixels" or "latents". weight: step, counted from 0 -> weight; the
    term is not computed in steps where it is 0. compute: returns the scalar. For a term at the pixels it is called
    with (reconstruction, images), (B, 3, H, W) each, the images in [-1, 1]; for a term at the latents with
    (z, images), the raw latents z (B, C, h, w) and the input of the encoder.

    learned: for a term at the latents, a function that makes a layer for latents of the given number of channels.
    The layer is trained with the autoencoder and saved in its checkpoints under the term's name. `compute` then
    gets its output in place of z, and the weight must never be 0. save: (layer, folder), writes what the layer has
    learned into the folder of the exported model. scaling_factor: that of the exported model, if what is saved
    depends on it; None: as it is measured.
    """

    name: str
    at: Literal["pixels", "latents"]
    weight: Callable[[int], float]
    compute: Callable[[Tensor, Tensor], Tensor]
    learned: Callable[[int], nn.Module] | None = None
    save: Callable[[nn.Module, Path], None] | None = None
    scaling_factor: float | None = None
