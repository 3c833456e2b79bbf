"""`TASKS`: what a run can train, from the values of the key `task` to their classes of configuration."""

import difflib
from typing import Any

from .autoencoder import AutoencoderConfig
from .code_prior import CodePriorConfig
from .codec import EntropyModelConfig
from .latent_diffusion import LatentDiffusionConfig
from .run import Config

TASKS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderConfig,
    "code_prior": CodePriorConfig,
    "entropy_model": EntropyModelConfig,
    "latent_diffusion": LatentDiffusionConfig,
}


def config_class(values: dict[str, Any]) -> type[Config]:
    """The class that the key `task` of a configuration chooses. Raises ValueError for an unknown task."""
    task = values.get("task", "autoencoder")
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    near = difflib.get_close_matches(str(task)[:80], TASKS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"task: {repr(task)[:60]}; allowed: {', '.join(TASKS)}{meant}")
