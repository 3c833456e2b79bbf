"""The scaling of latents that diffusion models expect, as the configs of diffusers write it down."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def scale(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Raw latents (B, C, h, w) -> what a diffusion model works on, as diffusers' pipelines compute it.

    With `latents_mean` and `latents_std` in the config (SDXL pipelines): (z - mean) * scaling_factor / std per
    channel; otherwise (z - shift_factor) * scaling_factor (SD3, FLUX), without a shift in SD.
    Raises ValueError if C is not the length of mean and std.
    """
    factor, shift = config["scaling_factor"], config.get("shift_factor")
    if _per_channel(config):
        mean, std = _channel_values(config, z)
        return (z - mean) * factor / std
    return z * factor if shift is None else (z - shift) * factor


def unscale(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The inverse of `scale`: z * std / scaling_factor + mean, or z / scaling_factor + shift_factor."""
    factor, shift = config["scaling_factor"], config.get("shift_factor")
    if _per_channel(config):
        mean, std = _channel_values(config, z)
        return z * std / factor + mean
    return z / factor if shift is None else z / factor + shift


def _per_channel(config: Mapping[str, Any]) -> bool:
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _channel_values(config: Mapping[str, Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """latents_mean and latents_std as (1, C, 1, 1), in the type and on the device of z."""
    values = [
        torch.tensor(config[key], dtype=z.dtype, device=z.device) for key in ("latents_mean", "latents_std")
    ]
    if z.ndim != 4 or any(len(value) != z.shape[1] for value in values):
        channels = len(values[0])
        raise ValueError(
            f"latents must be (B, {channels}, h, w) for latents_mean and latents_std, not {tuple(z.shape)}"
        )
    return tuple(value.view(1, -1, 1, 1) for value in values)
