"""`Term`: a further term of the objective, beside reconstruction, KL, LPIPS and the adversarial term.

A term at the pixels is a scalar of the reconstruction; its gradient there is added to the others', so that any
number of them costs one backward pass through the autoencoder. A term at the latents is a scalar of the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Term:
    """A scalar that is added to the loss.

    name: under which it is logged. at: "pixels", called with (reconstruction, images), (B, 3, H, W) each, or
    "latents", called with (z, images), z (B, C, h, w) and the input of the encoder. weight: a function of the
    step's number, which counts from 0; a weight of 0 costs nothing. learned: for a term at the latents, makes a
    layer for latents of so many channels, which is trained with the autoencoder and saved in its checkpoints under
    the term's name; `compute` is then called with the output of the layer, and the weight must never be 0.
    """

    name: str
    at: Literal["pixels", "latents"]
    weight: Callable[[int], float]
    compute: Callable[[Tensor, Tensor], Tensor]
    learned: Callable[[int], nn.Module] | None = None
