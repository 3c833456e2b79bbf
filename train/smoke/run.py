"""Shrink what the recipes of all tasks have: steps, intervals, accumulation. Each task shrinks its own sections.

Mistakes in a recipe are mostly in how its parts work together: the objective, mixed precision, gradient
accumulation, the moving average, checkpoints, the export. These stay as the recipe has them; on a GPU compilation
does, too.
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

# 2 steps without the discriminator, 1 in which it trains alone, 1 of the ramp, 2 with everything
STEPS = 6
# class of a task's configuration -> the module with its `shrink` and `replaced`
OWN_SECTIONS = {
    AutoencoderConfig: autoencoder,
    CodePriorConfig: code_prior,
    EntropyModelConfig: codec,
    LatentDiffusionConfig: latent_diffusion,
}


@contextmanager
def smoke_run(config: Config) -> Iterator[Config]:
    """Yield the shrunk configuration; its temporary folder is the same on every rank, and removed at the end."""
    place = distributed.join()
    with tempfile.TemporaryDirectory(prefix="smoke-") as own, download_timeout():
        [folder, *_] = distributed.gather([own])
        yield shrink(config, Path(folder) / "run")
        if (
            torch.distributed.is_initialized()
        ):  # it is not after training that ended well, which ends the group
            place.wait_for_everyone()  # the folder is removed after this


def shrink(config: Config, folder: Path) -> Config:
    """Return the same recipe at small sizes, with output_dir `folder`; sources not on this machine are replaced."""
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
            compile=train.compile and not on_cpu,  # on a CPU compiling takes minutes
        ),
        log=replace(config.log, every=1),
        validation=replace(config.validation, every=min(config.validation.every, STEPS // 2)),
        checkpoint=replace(config.checkpoint, every=min(config.checkpoint.every, STEPS // 2)),
    )


def replaced(before: Config, after: Config) -> list[str]:
    """Return a line for each thing that is not tested: sources not on this machine, compilation on a CPU."""
    lines = OWN_SECTIONS[type(before)].replaced(before, after)
    if before.train.compile and not after.train.compile:
        lines.append("train.compile: compiling would take minutes on a CPU; not tested here")
    return lines
