"""The two networks of a model as other runtimes get them, and whether these compute what torch computes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..autoencoder_kl import ExactAutoencoder
from ..half_precision import float16, float16_check

MEASURED = 32  # latents a side of the images that float16's range is measured on
TRACED = (2, 8, 12)  # batch, height and width of latents: sides that differ, or torch takes them for one
CHECKED = ((1, 8, 8), (3, 5, 7), (1, 16, 9))  # batch, height and width of latents that both runtimes compute
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}  # of the range of the values that torch computes


class Graph(NamedTuple):
    """One of the two networks: its folder, its names for input and output, and the channels that it reads."""

    folder: str
    input: str
    output: str
    network: nn.Module
    channels: int
    factor: int  # its input's pixels a latent pixel, per side


def graphs(vae: ExactAutoencoder) -> tuple[Graph, Graph]:
    """Encoder and decoder with the 1x1 convolutions on the side of the latents, sharing the model's tensors."""
    encoder = nn.Sequential(*filter(None, (vae.encoder, vae.quant_conv)))
    decoder = nn.Sequential(*filter(None, (vae.post_quant_conv, vae.decoder)))
    c = vae.config
    return (
        Graph("vae_encoder", "sample", "latent_parameters", encoder, c.in_channels, vae.downsampling),
        Graph("vae_decoder", "latent_sample", "sample", decoder, c.latent_channels, 1),
    )


def example(graph: Graph, shape: tuple[int, int, int]) -> Tensor:
    """(B, channels, factor h, factor w), the same at every call."""
    (b, h, w), f = shape, graph.factor
    return torch.randn(b, graph.channels, h * f, w * f, generator=torch.Generator().manual_seed(h))


def differences(
    vae: ExactAutoencoder, computed: Callable[[Graph, Tensor], Tensor], runtime: str
) -> dict[str, float]:
    """By folder the largest |difference| between `computed(graph, x)` of a runtime and torch's results in float32.

    As a part of their range, at the batches and sizes of CHECKED. ValueError if one of them is beyond TOLERANCE.
    """
    dtype, found = vae.dtype, {}
    for graph in graphs(float16.copied(vae, torch.float32)):
        difference = float16_check.Difference()
        for shape in CHECKED:
            x = example(graph, shape).to(dtype)
            with torch.no_grad():
                difference.add(graph.network(x.float()), computed(graph, x))
        found[graph.folder] = difference.relative
        if not found[graph.folder] <= TOLERANCE[dtype]:
            told = f"{found[graph.folder]:.2g} of the range; allowed: {TOLERANCE[dtype]:g}"
            raise ValueError(f"{graph.folder}: {runtime} differs from torch by {told}; nothing is written")
    return found


def described(found: dict[str, float], runtime: str) -> str:
    """The result of `differences` in words."""
    sizes = ", ".join("x".join(map(str, shape)) for shape in CHECKED)
    parts = [f"{folder} within {math.ceil(value * 1e8) / 1e8:.2g}" for folder, value in found.items()]
    return f"checked {runtime} against torch at latents of {sizes}: {', '.join(parts)} of the range"


@torch.no_grad()
def safe_in_float16(vae: ExactAutoencoder) -> ExactAutoencoder:
    """The same function in float16: as it is where every activation is in range, else by `float16.rescaled`.

    `vae` is in float32. Measured on hard images and scikit-image's photographs, of MEASURED
    latents a side. ValueError if rescaling does not help.
    """
    size = MEASURED * vae.downsampling
    images = [*float16_check.hard_images(size), *float16_check.sample_photographs(size)]
    noise = [float16_check.noise_latents(vae, size)]
    reached = float16.measure(vae, images, noise)
    if reached.unsafe():
        vae = float16.rescaled(vae, reached)
        if stuck := float16.measure(vae, images, noise).unsafe():
            raise ValueError(f"float16: rescaling cannot bring into range: {', '.join(stuck[:4])}")
    return float16.copied(vae, torch.float16, force_upcast=False)
