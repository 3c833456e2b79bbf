"""Refuse configurations that need more memory than there is, before anything of that size is allocated."""

import os

import torch

from kl_autoencoder.inference.memory import total_host_memory
from kl_autoencoder.models.classes import CLASSES

from ..config import AutoencoderConfig
from .adversarial.discriminator import PatchDiscriminator

FLOAT = 4  # bytes of a value: weights, gradients and moments are float32, whatever the mixed precision
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def check_weights(config: AutoencoderConfig, memory: int) -> None:
    """Raise ValueError if a network's weights, gradients and optimizer state exceed `memory` bytes.

    They are counted on torch's meta device, whose tensors have shapes but no data. A pretrained autoencoder is not
    checked, since its file exists. Raises ValueError also for keys from which no network can be built.
    """
    if config.model.pretrained is None:
        try:
            with torch.device("meta"):
                network = CLASSES[config.model.class_name](**config.model.options())
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        # weight, gradient and Adam's two moments, and the moving average
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
    """Raise ValueError if the inputs of all ResNet blocks for a batch exceed `memory` bytes.

    network: the autoencoder's config. The backward pass needs the input of each block, whatever else is recomputed;
    encoder and decoder together have (2 * layers_per_block + 1) blocks a level. This is a lower bound: a batch that
    is refused cannot fit, and one that passes may still be too large.
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
    """Bytes of memory for one rank: those of its GPU, or its equal share of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return int(total_host_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_held_out(images: int, side: int, memory: int, channels: int = 3) -> None:
    """Raise ValueError if a rank's held-out images, side x side pixels of 8 bits a value, exceed `memory` bytes."""
    what = f"data.validation_images: {images} of {side}x{side}"
    _refuse_above(memory, images * channels * side**2, what, "a rank")


def readable(size: int) -> str:
    """A number of bytes for people to read, in powers of 1000: 618475290624 -> "618 GB"."""
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
