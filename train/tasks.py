"""What each task of `train/config/tasks.py` does: its `Task` by the class of its configuration."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .autoencoder.task import AutoencoderTask
from .codec.task import EntropyTask
from .config import AutoencoderConfig, CodePriorConfig, Config, EntropyModelConfig, LatentDiffusionConfig
from .diffusion.task import LatentDiffusionTask
from .loop.context import RunContext
from .loop.task import Task
from .prior.task import CodePriorTask
from .smoke import STATISTICS_SAMPLES


class Maker(NamedTuple):
    """What builds a task, and what builds it for a smoke test."""

    task: Callable[[RunContext], Task]
    small: Callable[[RunContext], Task]


TASKS: dict[type[Config], Maker] = {
    AutoencoderConfig: Maker(
        AutoencoderTask, partial(AutoencoderTask, statistics_samples=STATISTICS_SAMPLES)
    ),
    CodePriorConfig: Maker(CodePriorTask, CodePriorTask),
    EntropyModelConfig: Maker(EntropyTask, EntropyTask),
    LatentDiffusionConfig: Maker(LatentDiffusionTask, LatentDiffusionTask),
}


def task_maker(config: Config, small: bool = False) -> Callable[[RunContext], Task]:
    """What builds the task that `config` describes. small: for a smoke test, which measures little."""
    maker = TASKS[type(config)]
    return maker.small if small else maker.task
