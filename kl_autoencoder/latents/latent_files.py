"""Latent files: the latents of images of any sizes in one .safetensors file, with names, sizes and scaling."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.formats import LATENTS_KEY
from ..files import read_tensors, save_tensors, shown
from ..models.config import SCALING, check_rules, is_patch, is_size
from ..models.scaling import SCALING_KEYS, unscale


@dataclass(frozen=True)
class LatentFile:
    """Content of a latent file: latents, name and size of each photograph, and the model that encoded them."""

    latents: list[Tensor]  # (C, h, w) each
    names: list[str]  # of the photographs' files
    sizes: list[tuple[int, int]]  # (height, width) in pixels before padding
    scaled: bool  # whether the latents are scaled (`scaling.scale`)
    model: str  # folder, file or hub id of the model that encoded them
    config: dict  # the model's scaling: scaling_factor, shift_factor, latents_mean, latents_std

    def raw(self) -> list[Tensor]:
        """The unscaled latents, as the decoder takes them: (C, h, w) each."""
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

    `latents`: (C, h, w) each; `sizes`: (height, width) in pixels, to which decoded photographs are cropped;
    `config`: that of the model, of which the scaling is stored. Raises ValueError if the lists differ in length, if
    latents are not (C, h, w) and for patches without statistics of channels; and the errors of `save_tensors`.
    """
    if not len(latents) == len(names) == len(sizes):
        raise ValueError(
            f"{len(latents)} latents, {len(names)} names and {len(sizes)} sizes: must be as many"
        )
    for name, z in zip(names, latents, strict=True):
        if z.ndim != 3:
            raise ValueError(f"{name}: latents must be (C, h, w), not {tuple(z.shape)}")
    scaling = {key: config.get(key) for key in SCALING_KEYS}
    if config.get("patch_size") is not None:
        if scaling["latents_std"] is None:
            raise ValueError("config: patch_size without latents_std; allowed: vae.scaling, of such a model")
        scaling["patch_size"] = list(config["patch_size"])
    about = {
        "names": [str(name) for name in names],
        "sizes": [[int(side) for side in size] for size in sizes],
        "scaled": bool(scaled),
        "model": str(model),
        "config": scaling,
    }
    tensors = {_key(i): z for i, z in enumerate(latents)}
    save_tensors(path, tensors, {LATENTS_KEY: json.dumps(about)})


def load_latents(path: str | os.PathLike) -> LatentFile:
    """Read a file of `save_latents` and check every entry.

    Raises FileNotFoundError, and ValueError, which names the file and, if it is a latent file, the wrong entry.
    """
    tensors, metadata = read_tensors(path)
    try:
        about = json.loads(metadata[LATENTS_KEY])
        names = about["names"]
        latents = [tensors[_key(i)] for i in range(len(names))]
        entries = {key: about[key] for key in ("sizes", "scaled", "model", "config")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of latents written by save_latents or `encode`") from error
    try:
        _check_entries(names, latents, **entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sizes = [(height, width) for height, width in entries.pop("sizes")]
    return LatentFile(latents, names, sizes, **entries)


def _check_entries(
    names: Any, latents: Sequence[Tensor], *, sizes: Any, scaled: Any, model: Any, config: Any
) -> None:
    """Raise ValueError, which names the first entry that `save_latents` cannot have written."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names: {shown(names)}; allowed: a list of names")
    if not isinstance(sizes, list) or len(sizes) != len(names) or not all(map(is_size, sizes)):
        raise ValueError(f"sizes: {shown(sizes)}; allowed: {len(names)} times (height, width)")
    for z, key in ((z, _key(i)) for i, z in enumerate(latents)):
        if z.ndim != 3 or not z.numel() or not z.is_floating_point():
            raise ValueError(f"{key}: {tuple(z.shape)} of {z.dtype}; allowed: floating-point (C, h, w)")
        if not z.isfinite().all():
            raise ValueError(f"{key}: not finite")
    for key, value, kind in (("scaled", scaled, bool), ("model", model, str), ("config", config, dict)):
        if not isinstance(value, kind):
            raise ValueError(f"{key}: {shown(value)}; allowed: {kind.__name__}")
    check_rules({key: config.get(key) for key in SCALING}, SCALING)
    patch = config.get("patch_size")
    if patch is not None and not is_patch(patch):
        raise ValueError(f"patch_size: {shown(patch)}; allowed: null or two whole numbers")
    # entries of latents_mean for each channel stored here
    values = math.prod(patch) if patch and not scaled else 1
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None and {len(config[key])} != {z.shape[0] * values for z in latents}:
            raise ValueError(
                f"{key}: {len(config[key])} values; allowed: one for each channel of the latents"
            )


def _key(index: int) -> str:
    return f"latents.{index:06d}"
