"""Checkpoints on disk: written beside and renamed when complete, verified when read, old ones removed.

A checkpoint is a folder `step-000200` of safetensors files, `state.json` (counters), the model's `config.json` and
`manifest.json`, which holds the size and SHA-256 of every other file and is written last; `damage` compares them.
No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kl_autoencoder.files import flush_folder, sync_files
from kl_autoencoder.models.run_folder import MANIFEST, NAME


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, config: str | None = None
) -> Path:
    """Write `root/step-NNNNNN` with a `<name>.safetensors` for each entry of `tensors`; returns its path.

    config: the model's config.json, so that commands can read the weights of a run that has not ended.

    Raises OSError naming the folder if it cannot be written (a full disk, say); earlier checkpoints are intact.
    """
    final = root / f"step-{step:06d}"
    beside = root / f".{final.name}.writing"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for name, group in tensors.items():
            save_file({k: v.detach().contiguous() for k, v in group.items()}, beside / f"{name}.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        if config is not None:
            (beside / "config.json").write_text(config, encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in beside.iterdir()
        }
        (beside / MANIFEST).write_text(json.dumps(files, indent=1))
        sync_files(beside.iterdir())
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved by a run that went on without it
        os.replace(beside, final)
        flush_folder(root)
    except Exception as error:  # safetensors raises its own type for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            f"{final}: the checkpoint could not be written ({error}); earlier ones are intact"
        ) from error
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors by file name and the state of a complete checkpoint. Raises ValueError naming what is damaged."""
    problem = damage(path)
    if problem:
        raise ValueError(f"{path}: {problem}")
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / "state.json").read_text())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by sizes and SHA-256 of its files, or None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if "state.json" not in written:
        return f"{MANIFEST} does not list state.json"
    for name, (size, digest) in written.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
        if _sha256(file) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def newest(root: Path, warn) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named to `warn` and set aside as `*.damaged`.

    Removes what a killed run left of a checkpoint that it was writing (named to `warn`) or removing.
    """
    for leftover in [*root.glob(".step-*.writing"), *root.glob(".step-*.removing")]:
        shutil.rmtree(leftover)
        if leftover.suffix == ".writing":
            warn(f"{leftover}: half written when the run ended; removed, the one before it is used")
    for path in reversed(checkpoints(root)):
        problem = damage(path)
        if problem is None:
            return path
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        warn(f"{path}: {problem}; set aside as {aside.name}, the one before it is used")
    return None


def rotate(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last` and each whose step is a multiple of `keep_every`."""
    for path in checkpoints(root)[:-keep_last]:
        step = int(NAME.fullmatch(path.name)[1])
        if not keep_every or step % keep_every:
            doomed = path.with_name(f".{path.name}.removing")  # never half of one under a checkpoint's name
            os.replace(path, doomed)
            shutil.rmtree(doomed)


# -------------------------------------------------------------------- optimizer state as tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{parameter index}.{name}` -> tensor, of an optimizer all of whose state is tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; hyperparameters stay those of the configuration.

    Raises RuntimeError for the state of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    indices = {int(key.partition(".")[0]) for key in tensors}
    if indices and indices != set(range(len(parameters))):
        raise RuntimeError(
            f"an optimizer's state of {len(indices)} parameters where {len(parameters)} are trained"
        )
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if name != "step":
            if value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)} where the parameter has {tuple(parameter.shape)}"
                raise RuntimeError(f"an optimizer's {name} of shape {shapes}")
            # fused kernels walk parameter and moments side by side: both must lie in memory alike (channels_last)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
