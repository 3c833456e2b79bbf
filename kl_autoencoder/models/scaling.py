"""The scaling of latents that diffusion models expect, as the configs of diffusers write it down."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of the config of a model
KEPT_KEYS = (*SCALING_KEYS, "patch_size")  # what `vae.scaling` may have, and files of latents keep
READ_BY = {  # what diffusers' pipelines read of them, and the channels of their published latents
    "sd": (("scaling_factor",), 4),
    "sdxl": (("scaling_factor", "latents_mean", "latents_std"), 4),
    "sd3": (("scaling_factor", "shift_factor"), 16),
    "flux": (("scaling_factor", "shift_factor"), 16),
}
PER_CHANNEL = ("latents_mean", "latents_std")


class ScaledLatents:
    """The part of an autoencoder that scales its latents, as its `scaling` says."""

    scaling: Any  # a property: the keys of the config that `scale` and `unscale` read
    register_to_config: Any  # diffusers'

    def set_scaling(self, statistics: Any) -> None:
        """Set what gives latents with these `LatentStatistics` unit variance."""
        self.register_to_config(scaling_factor=statistics.scaling_factor)

    def scale(self, z: Tensor) -> Tensor:
        """Raw latents -> the latents that a diffusion model works on (about zero mean, unit variance)."""
        return scale(z, self.scaling)

    def unscale(self, z: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return unscale(z, self.scaling)


def scale(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Raw latents (B, C, h, w) -> what a diffusion model works on, as diffusers' pipelines compute it.

    With `latents_mean` and `latents_std` in the config (SDXL pipelines): (z - mean) * scaling_factor / std per
    channel; otherwise (z - shift_factor) * scaling_factor (SD3, FLUX), without a shift in SD. With `patch_size`
    (FLUX.2) mean and std are those of patches (B, C*p*q, h/p, w/q), which come out.
    Raises ValueError if C is not the length of mean and std, and for latents that no patches fit into.
    """
    z = patchify(z, config.get("patch_size"))
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
        return unpatchify(z * std / factor + mean, config.get("patch_size"))
    return z / factor if shift is None else z / factor + shift


def patchify(z: Tensor, patch: Sequence[int] | None) -> Tensor:
    """(B, C, h, w) -> (B, C*p*q, h/p, w/q): the channels of a patch, row by row, behind one another."""
    if patch is None:
        return z
    (p, q), (b, c, h, w) = patch, z.shape
    if h % p or w % q:
        raise ValueError(f"latents of {h}x{w}; allowed: multiples of the patches' {p}x{q}")
    return z.view(b, c, h // p, p, w // q, q).permute(0, 1, 3, 5, 2, 4).reshape(b, c * p * q, h // p, w // q)


def unpatchify(z: Tensor, patch: Sequence[int] | None) -> Tensor:
    """The inverse of `patchify`."""
    if patch is None:
        return z
    (p, q), (b, c, h, w) = patch, z.shape
    return z.view(b, c // (p * q), p, q, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, h * p, w * q)


def from_statistics(
    found: Mapping[str, Any], pipeline: str | None = None, per_channel: bool = False
) -> dict[str, Any]:
    """The scaling, of all four keys, that gives latents of these statistics unit variance in a kind of pipeline.

    Args:
        found: scaling_factor, shift_factor, mean and std, as a data set's manifest has them.
        pipeline: one of READ_BY, of which nothing is set that it does not read; None sets a shift all the same.
        per_channel: a mean and a standard deviation for each channel. ValueError if the pipeline reads none.
    """
    keys = SCALING_KEYS if pipeline is None else READ_BY[pipeline][0]
    if per_channel and "latents_mean" not in keys:
        raise ValueError(f"{pipeline} pipelines read no latents_mean and latents_std; those of sdxl do")
    if per_channel:
        values = {"scaling_factor": 1.0, "latents_mean": found["mean"], "latents_std": found["std"]}
    else:
        values = {key: found[key] for key in ("scaling_factor", "shift_factor") if key in keys}
    return {key: values.get(key) for key in SCALING_KEYS}


def pipelines_of(config: Mapping[str, Any]) -> list[str]:
    """The kinds of pipelines, of READ_BY, that scale latents as `scale` does with this config."""
    if config.get("patch_size") is not None:
        return ["flux2"]
    is_set = {key for key in SCALING_KEYS if config.get(key) is not None}
    is_set -= {"shift_factor"} if _per_channel(config) else set(PER_CHANNEL)  # what `scale` leaves aside
    needed = {"sd3": "shift_factor", "flux": "shift_factor"}  # they add it, None or not
    return [
        kind
        for kind, (keys, _) in READ_BY.items()
        if is_set <= {*keys} and needed.get(kind, keys[0]) in is_set
    ]


def described(config: Mapping[str, Any]) -> str:
    """The scaling that is set, with five digits: "scaling_factor 0.70067, shift_factor 0.30054"."""
    if config.get("patch_size") is not None:
        p, q = config["patch_size"]
        return f"mean and deviation of {len(config['latents_mean'])} channels of {p}x{q} patches"
    return ", ".join(f"{key} {rounded(config[key])}" for key in SCALING_KEYS if config.get(key) is not None)


def rounded(value: float | Sequence[float]) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else " ".join(map(rounded, value))


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
