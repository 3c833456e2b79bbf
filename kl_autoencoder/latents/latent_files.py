"""Latent files: the latents of images of any sizes in one .safetensors file, with names, sizes and scaling."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.formats import LATENTS_KEY
from ..files import read_tensors, save_tensors
from ..models.scaling import SCALING_KEYS, unscale


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
    save_tensors(path, tensors, {LATENTS_KEY: json.dumps(about)})


def load_latents(path: str | os.PathLike) -> LatentFile:
    """Read a file of `save_latents`. Raises FileNotFoundError, or ValueError naming a file that is not one."""
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata[LATENTS_KEY])
        latents = [tensors[_key(i)] for i in range(len(about["names"]))]
        sizes = [(int(height), int(width)) for height, width in about["sizes"]]
        return LatentFile(latents, about["names"], sizes, about["scaled"], about["model"], about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of latents written by save_latents or `encode`") from error


def _key(index: int) -> str:
    return f"latents.{index:06d}"
