"""Prepare for large images: tile the model, and refuse images that would not fit into memory."""

import torch

from ..inference.dispatch import largest_activation
from ..inference.memory import available_host_memory
from .autoencoder_kl import KLAutoencoder

# pixels. On a CPU one image takes as much and as long either way; on a GPU it takes less
TILED_FROM = 2048 * 2048
# Memory of execution in pieces, in units of the largest activation; measured with `compact`, from 1.67 at 1024 to
# 1.4 at 3072 pixels a side.
ACTIVATIONS_HELD = 1.5
# Further memory for each pixel: the image and its reconstruction, as floats, while they are scaled, and as 8 bits.
BYTES_A_PIXEL = 70


def prepare_for(vae: KLAutoencoder, height: int, width: int) -> None:
    """Tile the model if an image of `height` x `width` pixels is large, and only then.

    Raises ValueError if an image of this size would not fit into memory.
    """
    if not hasattr(vae, "enable_tiling"):  # an `Autoencoder`: executed whole
        return
    vae.enable_tiling(height * width >= TILED_FROM)
    activations, images = memory_needed(vae, height, width)
    left = available_host_memory()
    on_gpu = vae.device.type == "cuda"
    needed_here = images if on_gpu else activations + images
    if needed_here > left:
        raise ValueError(_too_large(height, width, needed_here, left, "memory"))
    if on_gpu:
        free = torch.cuda.mem_get_info(vae.device)[0]
        free += torch.cuda.memory_reserved(vae.device) - torch.cuda.memory_allocated(vae.device)
        if activations > free:
            raise ValueError(_too_large(height, width, activations, free, "GPU memory"))


def memory_needed(vae: KLAutoencoder, height: int, width: int) -> tuple[int, int]:
    """Return the bytes for activations, on the model's device, and for images, on the CPU."""
    f = vae.downsampling
    rows, columns = -(-height // f), -(-width // f)
    with torch.device("meta"):
        images = torch.empty(1, vae.config.in_channels, f * rows, f * columns)
        latents = torch.empty(1, vae.config.latent_channels, rows, columns)
    elements = max(largest_activation(vae.encoder, images), largest_activation(vae.decoder, latents))
    return int(ACTIVATIONS_HELD * elements * vae.dtype.itemsize), BYTES_A_PIXEL * height * width


def _too_large(height: int, width: int, needed: int, left: float, what: str) -> str:
    return (
        f"{width}x{height} pixels need about {needed / 1e9:.1f} GB of {what}, and {left / 1e9:.1f} GB are free; "
        "--size N scales an image down"
    )
