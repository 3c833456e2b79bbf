"""Scale latents for diffusion models, by the keys that the configs of diffusers have for this."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCALING_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # in the config of a model
KEPT_KEYS = (*SCALING_KEYS, "patch_size")  # in `vae.scaling` and in files of latents
READ_BY = {  # kind of pipeline -> keys that it reads, channels of its published latents
    "sd": (("scaling_factor",), 4),
    "sdxl": (("scaling_factor", "latents_mean", "latents_std"), 4),
    "sd3": (("scaling_factor", "shift_factor"), 16),
    "flux": (("scaling_factor", "shift_factor"), 16),
}
PER_CHANNEL = ("latents_mean", "latents_std")


class ScaledLatents:
    """Mixin of autoencoders that scales their latents by their `scaling`."""

    scaling: Any  # a property: the arguments of `scale` and `unscale`
    register_to_config: Any  # diffusers'

    def set_scaling(self, statistics: Any) -> None:
        """Set the scaling_factor that gives latents with these `LatentStatistics` unit variance."""
        self.register_to_config(scaling_factor=statistics.scaling_factor)

    def scale(self, z: Tensor) -> Tensor:
        """Raw latents -> the latents that a diffusion model works on (about zero mean, unit variance)."""
        return scale(z, self.scaling)

    def unscale(self, z: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return unscale(z, self.scaling)


def scale(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Raw latents (B, C, h, w) -> the latents that a diffusion model works on, as in diffusers' pipelines.

    With `latents_mean` and `latents_std` in the config (SDXL): (z - mean) * scaling_factor / std for each channel.
    Otherwise (z - shift_factor) * scaling_factor (SD3, FLUX), or z * scaling_factor (SD). With `patch_size` (p, q)
    (FLUX.2), z is first cut into patches, (B, C*p*q, h/p, w/q); mean and std are those of the channels of patches.

    Raises ValueError if mean and std do not have a value for each channel, and if h or w is not a multiple of the
    patch size.
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
    """(B, C, h, w) -> (B, C*p*q, h/p, w/q): channel c*p*q + i*q + j is pixel (i, j) of a patch in channel c."""
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
    """Return the scaling (all of `SCALING_KEYS`) that gives latents with these statistics unit variance.

    Args:
        found: scaling_factor, shift_factor, mean and std, as in the manifest of a data set.
        pipeline: a kind in READ_BY; keys that it does not read are None. Without a kind, all keys may be set.
        per_channel: use a mean and a standard deviation for each channel.

    Raises ValueError for `per_channel` if the pipeline does not read these.
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
    """Return the kinds of pipelines (READ_BY, or flux2) that scale latents as `scale` does with this config."""
    if config.get("patch_size") is not None:
        return ["flux2"]
    is_set = {key for key in SCALING_KEYS if config.get(key) is not None}
    is_set -= {"shift_factor"} if _per_channel(config) else set(PER_CHANNEL)  # keys that `scale` does not use
    # These pipelines always add a shift, so it must be set.
    needed = {"sd3": "shift_factor", "flux": "shift_factor"}
    return [
        kind
        for kind, (keys, _) in READ_BY.items()
        if is_set <= {*keys} and needed.get(kind, keys[0]) in is_set
    ]


def described(config: Mapping[str, Any]) -> str:
    """Return the scaling in words, with five digits: "scaling_factor 0.70067, shift_factor 0.30054"."""
    if config.get("patch_size") is not None:
        p, q = config["patch_size"]
        return f"mean and deviation of {len(config['latents_mean'])} channels of {p}x{q} patches"
    return ", ".join(f"{key} {rounded(config[key])}" for key in SCALING_KEYS if config.get(key) is not None)


def rounded(value: float | Sequence[float]) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else " ".join(map(rounded, value))


def _per_channel(config: Mapping[str, Any]) -> bool:
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _channel_values(config: Mapping[str, Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents_mean and latents_std as (1, C, 1, 1), in the dtype and on the device of z."""
    values = [
        torch.tensor(config[key], dtype=z.dtype, device=z.device) for key in ("latents_mean", "latents_std")
    ]
    if z.ndim != 4 or any(len(value) != z.shape[1] for value in values):
        channels = len(values[0])
        raise ValueError(
            f"latents must be (B, {channels}, h, w) for latents_mean and latents_std, not {tuple(z.shape)}"
        )
    return tuple(value.view(1, -1, 1, 1) for value in values)
