"""Latents: the scaling that diffusion models expect, statistics over a data set, and files of them."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .files import read_tensors, save_tensors

FILE_KEY = "kl_autoencoder.latents"  # in the metadata of latent files
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


class LatentStatistics:
    """Mean and standard deviation of latents, per channel and of all, over any number of batches.

    Keeps, per channel and in float64 on the CPU: the count n, the mean and M2 = sum (z - mean)^2. Disjoint
    parts merge exactly (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm"):
    M2 = sum M2_i + sum n_i (mean_i - mean)^2.
    """

    def __init__(self, channels: int):
        self.count = 0.0  # values seen in each channel
        self.channel_mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor, variance: Tensor | None = None) -> None:
        """Add raw latents (B, C, h, w). ValueError for other channels and for values that are not finite.

        `variance`, of the same shape: the latents are means of posteriors with this variance, and what is added is
        all samples of them: Var[z] = Var[mean] + E[variance].
        """
        channels = len(self.channel_mean)
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must be (B, {channels}, h, w), not {tuple(latents.shape)}")
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)
        if not values.isfinite().all():
            raise ValueError(
                f"{int((~values.isfinite()).sum())} of {values.numel()} latents are NaN or infinite"
            )
        batch = LatentStatistics(channels)
        batch.count = float(values.shape[1])
        batch.channel_mean = values.mean(1)
        batch.m2 = (values - batch.channel_mean[:, None]).square().sum(1)
        if variance is not None:
            batch.m2 += variance.detach().cpu().double().sum(dim=(0, 2, 3))
        self.merge(batch)

    def merge(self, other: "LatentStatistics") -> None:
        """Add what `other` has seen, which must be other latents of the same number of channels."""
        count = self.count + other.count
        if count:
            mean = (self.count * self.channel_mean + other.count * other.channel_mean) / count
            self.m2 = self._m2_about(mean) + other._m2_about(mean)
            self.count, self.channel_mean = count, mean

    def reduced(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> "LatentStatistics":
        """The statistics of all ranks together, on every rank; a rank that has seen nothing takes part.

        `sum_over_ranks` adds up a float64 tensor over the ranks and returns the sum, such as
        `lambda t: accelerator.reduce(t, "sum")`. It is called twice: the mean of all first, then M2 about it.
        """
        total = LatentStatistics(len(self.channel_mean))
        sums = sum_over_ranks(
            torch.cat([torch.tensor([self.count]).double(), self.count * self.channel_mean])
        )
        total.count = float(sums[0])
        total.channel_mean = sums[1:].cpu() / max(total.count, 1.0)
        total.m2 = sum_over_ranks(self._m2_about(total.channel_mean)).cpu()
        return total

    def state(self) -> dict:
        """The three, exactly, as JSON can hold them; `from_state` makes the same statistics of it."""
        return {"count": self.count, "mean": self.channel_mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LatentStatistics":
        statistics = cls(len(state["mean"]))
        statistics.count = state["count"]
        statistics.channel_mean = torch.tensor(state["mean"], dtype=torch.float64)
        statistics.m2 = torch.tensor(state["m2"], dtype=torch.float64)
        return statistics

    @property
    def mean(self) -> Tensor:
        """(C,), float64: the mean of each channel."""
        self._check()
        return self.channel_mean

    @property
    def std(self) -> Tensor:
        """(C,), float64: the standard deviation of each channel about its own mean (divided by n)."""
        self._check()
        return (self.m2 / self.count).sqrt()

    @property
    def shift_factor(self) -> float:
        """The mean over all channels together."""
        return float(self.mean.mean())

    @property
    def scaling_factor(self) -> float:
        """1 / standard deviation about the mean, over all channels together (Rombach et al. 2022, section D.1)."""
        self._check()
        variance = float(self._m2_about(self.channel_mean.mean()).sum()) / (self.count * len(self.m2))
        if variance == 0:
            raise ValueError("all latents are equal: no scaling factor gives them unit variance")
        return 1 / math.sqrt(variance)

    def _m2_about(self, point: Tensor) -> Tensor:
        return self.m2 + self.count * (self.channel_mean - point) ** 2

    def _check(self) -> None:
        if not self.count:
            raise ValueError("no latents have been added to these statistics")


@dataclass(frozen=True)
class LatentFile:
    """What a latent file holds: of each photograph its latents, name and size, and what they were made with."""

    latents: list[Tensor]  # (C, h, w) each
    names: list[str]  # of the photographs' files
    sizes: list[tuple[int, int]]  # (height, width) in pixels before padding
    scaled: bool  # whether `scale` was applied
    model: str  # what encoded them: folder, file or hub id
    config: dict  # the model's scaling: scaling_factor, shift_factor, latents_mean, latents_std

    def raw(self) -> list[Tensor]:
        """The latents as the decoder takes them, (C, h, w) each."""
        return [unscale(z[None], self.config)[0] for z in self.latents] if self.scaled else list(self.latents)


def save_latents(
    path: str | os.PathLike,
    latents: Sequence[Tensor],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    config: Mapping[str, Any],
    model: str = "",
    scaled: bool = False,
) -> None:
    """Write the latents of photographs of any sizes into one .safetensors file, whole or not at all.

    `latents`: (C, h, w) each; `sizes`: (height, width) in pixels to crop the decoded photographs to; `config`:
    the model's, of which the scaling is kept. Raises ValueError if the lists differ in length or a shape is
    not that of a latent, and as `save_tensors`.
    """
    if not len(latents) == len(names) == len(sizes):
        raise ValueError(
            f"{len(latents)} latents, {len(names)} names and {len(sizes)} sizes: must be as many"
        )
    for name, z in zip(names, latents, strict=True):
        if z.ndim != 3:
            raise ValueError(f"{name}: latents must be (C, h, w), not {tuple(z.shape)}")
    about = {
        "names": [str(name) for name in names],
        "sizes": [[int(side) for side in size] for size in sizes],
        "scaled": bool(scaled),
        "model": str(model),
        "config": {key: config.get(key) for key in SCALING_KEYS},
    }
    tensors = {_key(i): z for i, z in enumerate(latents)}
    save_tensors(path, tensors, {FILE_KEY: json.dumps(about)})


def load_latents(path: str | os.PathLike) -> LatentFile:
    """Read a file of `save_latents`. Raises FileNotFoundError, or ValueError naming a file that is not one."""
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata[FILE_KEY])
        latents = [tensors[_key(i)] for i in range(len(about["names"]))]
        sizes = [(int(height), int(width)) for height, width in about["sizes"]]
        return LatentFile(latents, about["names"], sizes, about["scaled"], about["model"], about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of latents written by save_latents or `encode`") from error


def _key(index: int) -> str:
    return f"latents.{index:06d}"


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
