"""The `Task` that each class of configuration of `train/config/tasks.py` trains."""

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
    """How to build a task, and how to build it for a smoke test (`small`)."""

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
    """The function that builds the task of `config`; small: for a smoke test, which measures on few samples."""
    maker = TASKS[type(config)]
    return maker.small if small else maker.task
