"""Checkpoints on disk: written under a temporary name, renamed when complete, verified when read, removed when old.

A checkpoint is a folder such as `step-000200`. It holds safetensors files, `state.json` (counters), the model's
`config.json` and `manifest.json`, which is written last and holds the size and SHA-256 of every other file;
`damage` compares them. No pickle is written or read.
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

    state: counters, which are saved as JSON. config: the text of the model's config.json, so that commands can read
    the weights of a run that has not ended. Raises OSError, which names the folder, if it cannot be written (a full
    disk, say); earlier checkpoints stay intact.
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
        shutil.rmtree(final, ignore_errors=True)  # left by an earlier start that saved this step, too
        os.replace(beside, final)
        flush_folder(root)
    except Exception as error:  # safetensors raises its own type for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            f"{final}: the checkpoint could not be written ({error}); earlier ones are intact"
        ) from error
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Read a checkpoint: {file name without suffix: {tensor name: tensor}}, on the CPU, and its state.

    Raises ValueError, which names what is damaged, unless the checkpoint is whole.
    """
    problem = damage(path)
    if problem:
        raise ValueError(f"{path}: {problem}")
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / "state.json").read_text())


def damage(path: Path) -> str | None:
    """Compare a checkpoint's files with its manifest (size, SHA-256): what is wrong, or None if it is whole."""
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
    """The folders of finished checkpoints in `root`, oldest first."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def newest(root: Path, warn) -> Path | None:
    """Find the newest checkpoint that is whole, or None; newer, damaged ones are renamed to `*.damaged`.

    Also removes the remains of checkpoints that a killed run was writing or removing. `warn` is called with a line
    for each damaged and each half-written checkpoint.
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
    """Remove old checkpoints: all but the newest `keep_last` and those whose step is a multiple of `keep_every`."""
    for path in checkpoints(root)[:-keep_last]:
        step = int(NAME.fullmatch(path.name)[1])
        if not keep_every or step % keep_every:
            # renamed first, so that no half-removed folder ever has a checkpoint's name
            doomed = path.with_name(f".{path.name}.removing")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


# -------------------------------------------------------------------- optimizer state as tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as {"<parameter index>.<name>": tensor}; all of it must be tensors, as AdamW's is."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned; hyperparameters, such as the rate, stay those of `optimizer`.

    Raises RuntimeError if the number or the shapes of the parameters differ.
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
            # fused AdamW needs moments in the memory format of their parameter, which may be channels_last
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
