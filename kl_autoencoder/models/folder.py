"""Read the config and the headers of the weights in a model's folder; neither is trusted."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import clipped, read_header, shown

if TYPE_CHECKING:  # the commands look at a config before they import torch
    from torch import Tensor

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for the files of weights
ENTROPY_MODEL = "entropy_model.safetensors"  # of the codec, beside the weights
LARGEST_JSON = 1 << 20  # in bytes; published configs have less than 1000


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises FileNotFoundError, or ValueError naming the file if it holds none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; allowed: up to {LARGEST_JSON}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({clipped(str(error), 80)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {shown(content)}; allowed: a JSON object")
    return content


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the .safetensors files (one, or several shards) that diffusers loads for a `variant`; [] if none.

    Raises ValueError naming an index of shards that is invalid.
    """
    dotted = f".{variant}" if variant else ""
    whole = folder / f"{WEIGHTS}{dotted}.safetensors"
    index = folder / f"{WEIGHTS}.safetensors.index{dotted}.json"
    if not index.is_file():
        return [whole] if whole.is_file() else []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: weight_map: {shown(shards)}; allowed: names of tensors to names of files")
    return [folder / Path(name).name for name in sorted(set(shards.values()))]


def read_headers(folder: Path, variant: str | None = None) -> "dict[str, Tensor]":
    """Return the names and shapes of the weights, as tensors on the meta device; {} without .safetensors files.

    Raises the errors of `files.read_header` and `weight_files`.
    """
    return {name: t for path in weight_files(folder, variant) for name, t in read_header(path).items()}
