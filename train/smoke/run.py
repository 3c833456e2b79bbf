"""What shrinks in the recipe of every task: steps, intervals, accumulation. Each task shrinks its own sections.

What a recipe can get wrong is mostly how its parts meet: the objective, mixed precision, gradient accumulation, the
moving average, checkpoints, the export. These stay as the recipe has them, and on a GPU compilation too.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kl_autoencoder import distributed
from kl_autoencoder.evaluation.frechet import download_timeout

from ..config import (
    AutoencoderConfig,
    CodePriorConfig,
    Config,
    EntropyModelConfig,
    LatentDiffusionConfig,
)
from . import autoencoder, code_prior, codec, latent_diffusion

STEPS = 6  # 2 without the discriminator, 1 in which it trains unfelt, 1 of the ramp, 2 of everything
# by the class of a task's configuration, the module with its `shrink` and `replaced`
OWN_SECTIONS = {
    AutoencoderConfig: autoencoder,
    CodePriorConfig: code_prior,
    EntropyModelConfig: codec,
    LatentDiffusionConfig: latent_diffusion,
}


@contextmanager
def smoke_run(config: Config) -> Iterator[Config]:
    """The shrunk configuration, in a temporary folder that is the same on every rank and gone after the block."""
    place = distributed.join()
    with tempfile.TemporaryDirectory(prefix="smoke-") as own, download_timeout():
        [folder, *_] = distributed.gather([own])
        yield shrink(config, Path(folder) / "run")
        if torch.distributed.is_initialized():  # not where training has ended well: the ranks parted after it
            place.wait_for_everyone()  # before the folder goes


def shrink(config: Config, folder: Path) -> Config:
    """The same recipe at small sizes, writing to `folder`; a source that is not on this machine is replaced."""
    config = OWN_SECTIONS[type(config)].shrink(config)
    train, optimizer = config.train, config.optimizer
    on_cpu = not torch.accelerator.is_available()
    return replace(
        config,
        output_dir=str(folder),
        optimizer=replace(optimizer, warmup_steps=min(optimizer.warmup_steps, 1)),
        train=replace(
            train,
            steps=min(train.steps, STEPS),
            gradient_accumulation=min(train.gradient_accumulation, 2),
            mixed_precision="bf16" if on_cpu and train.mixed_precision == "fp16" else train.mixed_precision,
            compile=train.compile and not on_cpu,  # minutes there, for a few steps
        ),
        log=replace(config.log, every=1),
        validation=replace(config.validation, every=min(config.validation.every, STEPS // 2)),
        checkpoint=replace(config.checkpoint, every=min(config.checkpoint.every, STEPS // 2)),
    )


def replaced(before: Config, after: Config) -> list[str]:
    """What of the recipe is not tested, a line each: sources that are not on this machine, and compilation."""
    lines = OWN_SECTIONS[type(before)].replaced(before, after)
    if before.train.compile and not after.train.compile:
        lines.append("train.compile: compiling would take minutes on a CPU; not tested here")
    return lines
