"""The encoder and decoder of a model as they are exported, and the comparison of other runtimes with torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..autoencoder_kl import ExactAutoencoder
from ..half_precision import float16, float16_check

MEASURED = 32  # side in latent pixels of the images that activations are measured on for float16
# Batch, height and width of latents for tracing; sides must differ, or torch takes them for the same size.
TRACED = (2, 8, 12)
CHECKED = ((1, 8, 8), (3, 5, 7), (1, 16, 9))  # batch, height and width of the latents for the comparison
# Largest difference allowed, relative to the range of torch's values.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


class Graph(NamedTuple):
    """Encoder or decoder for export: its folder, names of input and output, and the channels of its input."""

    folder: str
    input: str
    output: str
    network: nn.Module
    channels: int
    factor: int  # pixels of the input for each latent pixel, per side


def graphs(vae: ExactAutoencoder) -> tuple[Graph, Graph]:
    """Return encoder and decoder, each with its 1x1 convolution if there is one; tensors are the model's own."""
    encoder = nn.Sequential(*filter(None, (vae.encoder, vae.quant_conv)))
    decoder = nn.Sequential(*filter(None, (vae.post_quant_conv, vae.decoder)))
    c = vae.config
    return (
        Graph("vae_encoder", "sample", "latent_parameters", encoder, c.in_channels, vae.downsampling),
        Graph("vae_decoder", "latent_sample", "sample", decoder, c.latent_channels, 1),
    )


def example(graph: Graph, shape: tuple[int, int, int]) -> Tensor:
    """Return noise for latents of `shape` (B, h, w): (B, channels, factor*h, factor*w), the same at every call."""
    (b, h, w), f = shape, graph.factor
    return torch.randn(b, graph.channels, h * f, w * f, generator=torch.Generator().manual_seed(h))


def differences(
    vae: ExactAutoencoder, computed: Callable[[Graph, Tensor], Tensor], runtime: str
) -> dict[str, float]:
    """Return for each folder the largest |difference| between `computed(graph, x)` and torch's float32 results.

    Relative to the range of torch's results, over the batches and sizes of CHECKED. Raises ValueError for a
    difference above TOLERANCE.
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
    """Return the result of `differences` in words."""
    sizes = ", ".join("x".join(map(str, shape)) for shape in CHECKED)
    parts = [f"{folder} within {math.ceil(value * 1e8) / 1e8:.2g}" for folder, value in found.items()]
    return f"checked {runtime} against torch at latents of {sizes}: {', '.join(parts)} of the range"


@torch.no_grad()
def safe_in_float16(vae: ExactAutoencoder) -> ExactAutoencoder:
    """Return the model in float16, rescaled by `float16.rescaled` if an activation would be out of range.

    `vae` must be in float32. Activations are measured on hard images and scikit-image's photographs of MEASURED
    latent pixels a side, and on noise. Raises ValueError if rescaling does not bring all into range.
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
