"""The weights in a folder that the training program writes: its newest checkpoint, and whether an export is as new.

A checkpoint is `checkpoints/step-000200/` with the model's config.json, `ema.safetensors` (the moving average, in a
run that keeps one), `model.safetensors` (the weights themselves), and a manifest that is written last.
"""

import json
import re
from pathlib import Path
from typing import Any

from .folder import CONFIG, read_json

METRICS_FILE = "metrics.jsonl"  # what the run measured, a line for each time
MANIFEST, TRAINED = "manifest.json", "training.json"  # the second lies in an export and says its step
WEIGHTS = {"ema.safetensors": "moving average", "model.safetensors": "without a moving average"}
NAME = re.compile(r"step-(\d{6,})")


def newer_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run's folder (or a checkpoint's own) stands for; None where the export is as new.

    An export that does not say of which step it is counts as the newest.
    """
    if is_checkpoint(folder):
        return folder
    root = folder / "checkpoints"
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and is_checkpoint(path)]
    if not found:
        return None
    newest = max(found, key=step_of)
    if not (folder / "export" / CONFIG).is_file():
        return newest
    trained = folder / "export" / TRAINED
    exported = read_json(trained).get("step") if trained.is_file() else None
    return newest if isinstance(exported, int) and exported < step_of(newest) else None


def step_of(checkpoint: Path) -> int:
    name = NAME.fullmatch(checkpoint.name)
    step = int(name[1]) if name else read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise ValueError(f"{checkpoint / 'state.json'}: says no step")
    return step


def is_checkpoint(folder: Path) -> bool:
    """Whether all files that the manifest lists are there in their sizes, a config and weights among them.

    Their hashes are left to the training program, which must not go on from a changed bit.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if CONFIG not in manifest or not WEIGHTS.keys() & manifest.keys():
            return False
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def weights_in(checkpoint: Path) -> Path:
    """The moving average where there is one, as an export takes it."""
    return next(checkpoint / name for name in WEIGHTS if (checkpoint / name).is_file())


def described(folder: Path, checkpoint: Path) -> str:
    """A line that says which weights are read."""
    kind = WEIGHTS[weights_in(checkpoint).name]
    remark = "its scaling_factor is the one it started with"
    return f"{folder}: step {step_of(checkpoint)} ({kind}), from {checkpoint}; {remark}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are whole; none if there is no such file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off when the run was killed
            continue
    return found
