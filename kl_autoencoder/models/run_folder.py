"""Read the folder of a training run: its newest checkpoint, whether an export is as new, and its metrics.

A checkpoint is a folder `checkpoints/step-000200/` with the model's config.json, `ema.safetensors` (the moving
average of the weights, if the run keeps one), `model.safetensors` (the weights), and a manifest, which is written
last.
"""

import json
import re
from pathlib import Path
from typing import Any

from .folder import CONFIG, read_json

METRICS_FILE = "metrics.jsonl"  # measurements of the run, a line of JSON each
MANIFEST, TRAINED = "manifest.json", "training.json"  # TRAINED is in an export, and holds its step
WEIGHTS = {"ema.safetensors": "moving average", "model.safetensors": "without a moving average"}
NAME = re.compile(r"step-(\d{6,})")


def newer_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run's folder, or a checkpoint's own folder; None if the export is as new.

    None also if there is no checkpoint. An export that does not tell its step counts as the newest.
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
    """Return the training step of a checkpoint, by its name or its state.json.

    Raises ValueError if neither has it.
    """
    name = NAME.fullmatch(checkpoint.name)
    step = int(name[1]) if name else read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise ValueError(f"{checkpoint / 'state.json'}: says no step")
    return step


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has all files of its manifest in the right sizes, among them a config and weights.

    Hashes are checked only by the training program, which must not continue from a file with a changed bit.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if CONFIG not in manifest or not WEIGHTS.keys() & manifest.keys():
            return False
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def weights_in(checkpoint: Path) -> Path:
    """Return the file of the moving average if there is one (exports have it too), else that of the weights."""
    return next(checkpoint / name for name in WEIGHTS if (checkpoint / name).is_file())


def described(folder: Path, checkpoint: Path) -> str:
    """Return a line for the user that says which weights are read."""
    kind = WEIGHTS[weights_in(checkpoint).name]
    remark = "its scaling_factor is the one it started with"
    return f"{folder}: step {step_of(checkpoint)} ({kind}), from {checkpoint}; {remark}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics.jsonl, as dictionaries; [] if there is no such file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off when the run was killed
            continue
    return found
