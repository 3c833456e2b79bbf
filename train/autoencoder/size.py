"""Estimate what a configuration needs in memory before anything of that size is made."""

import os

import torch

from kl_autoencoder.inference.memory import total_host_memory
from kl_autoencoder.models.classes import CLASSES

from ..config import AutoencoderConfig
from .adversarial.discriminator import PatchDiscriminator

FLOAT = 4  # bytes; weights, gradients and moments are float32 whatever the mixed precision
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def check_weights(config: AutoencoderConfig, memory: int) -> None:
    """Refuse networks whose weights and optimizer state exceed `memory` bytes, having built none of them.

    Counted on torch's meta device, whose tensors have shapes and no data. A pretrained network is left out: it is
    as large as its file. Raises ValueError, also for keys from which no network can be built.
    """
    if config.model.pretrained is None:
        try:
            with torch.device("meta"):
                network = CLASSES[config.model.class_name](**config.model.options())
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        # weight, gradient and Adam's two moments; and the moving average
        copies = 4 + config.ema.enabled
        if config.model.network == "mlp":
            shape = f"hidden_sizes={list(config.model.hidden_sizes)}"
        else:
            shape = f"block_out_channels={list(network.config.block_out_channels)}"
            shape += f", layers_per_block={network.config.layers_per_block}"
        _refuse_above(memory, _parameters(network) * FLOAT * copies, f"model: {shape}", "to train")
    adversarial = config.loss.adversarial
    if adversarial.weight:
        with torch.device("meta"):
            network = PatchDiscriminator(config.data.channels, adversarial.channels, adversarial.layers)
        what = f"loss.adversarial: channels={adversarial.channels}, layers={adversarial.layers}"
        _refuse_above(memory, _parameters(network) * FLOAT * 4, what, "to train")


def check_step(config: AutoencoderConfig, network, memory: int) -> None:
    """Refuse a batch of which one activation a ResNet block exceeds `memory` bytes.

    `network` is the autoencoder's config. Each block's input at least is kept for the backward pass, however much
    of the rest is computed again: (2 layers + 1) blocks a level in encoder and decoder. So a batch that passes may
    be too large all the same, and none is refused that would fit.
    """
    if config.model.network == "mlp":
        return
    data, side, blocks = config.data, max(config.data.resolutions), 2 * network.layers_per_block + 1
    if config.train.decoder_only:
        blocks = network.layers_per_block + 1
    pixels = [width * (side >> level) ** 2 for level, width in enumerate(network.block_out_channels)]
    size = FLOAT if config.train.mixed_precision == "no" else FLOAT // 2
    what = f"data.batch_size: {data.batch_size} of {side}x{side}"
    _refuse_above(memory, data.batch_size * blocks * sum(pixels) * size, what, "for one step")


def device_memory(device: torch.device) -> int:
    """Bytes that one rank can hope for: those of its GPU, or its share of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(total_host_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_held_out(images: int, side: int, memory: int, channels: int = 3) -> None:
    """Refuse a rank's held-out images that exceed `memory` bytes once decoded, at 8 bits a value."""
    what = f"data.validation_images: {images} of {side}x{side}"
    _refuse_above(memory, images * channels * side**2, what, "a rank")


def readable(size: int) -> str:
    """618475290624 -> "618 GB", in powers of 1000."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _refuse_above(memory: int, needed: int, what: str, purpose: str) -> None:
    if needed > memory:
        here = f"at most {readable(memory)}, what a rank has here"
        raise ValueError(f"{what} would need {readable(needed)} {purpose}; allowed: {here}")
