"""Shrink a recipe so that all of its phases run in seconds on a CPU, offline: `python -m train CONFIG --smoke`.

What a recipe can get wrong is mostly how its parts meet: the objective, the discriminator that starts late,
mixed precision, gradient accumulation, the moving average, checkpoints, the export. These stay as the recipe has
them, and on a GPU compilation too. Sizes shrink: the network, the crops, the batch, the number of steps and each
delay in them.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kl_autoencoder import distributed
from kl_autoencoder.data.locating import SAMPLE_PHOTOGRAPHS
from kl_autoencoder.evaluation.frechet import download_timeout
from kl_autoencoder.evaluation.metrics import backbone_file
from kl_autoencoder.models.autoencoder_kl import COMPACT

from .config import AdversarialConfig, Config, ModelConfig
from .data.config import DataConfig

STEPS = 6  # 2 without the discriminator, 1 in which it trains unfelt, 1 of the ramp, 2 of everything
WIDTHS = (16, 32)  # of the first level and of all others: a shortcut convolution, as in the network itself
GROUPS = 4  # the fewest that `model.start: enlargement` has room for in 16 channels
STATISTICS_SAMPLES = 4  # the scaling factor that comes of it is thrown away
SIDE = 64  # pixels: a multiple of every downsampling up to 64, and enough for LPIPS


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
    """The same recipe at the sizes above, writing to `folder`; a source that is not on this machine is replaced."""
    train, loss, optimizer = config.train, config.loss, config.optimizer
    on_cpu = not torch.accelerator.is_available()
    return replace(
        config,
        output_dir=str(folder),
        data=_small_data(config.data),
        model=_small_network(config.model),
        loss=replace(
            loss,
            perceptual=replace(
                loss.perceptual, required=False, net=_net_with_local_backbone(loss.perceptual.net)
            ),
            kl=replace(loss.kl, warmup_steps=min(loss.kl.warmup_steps, 2)),
            adversarial=_early(loss.adversarial),
        ),
        optimizer=replace(optimizer, warmup_steps=min(optimizer.warmup_steps, 1)),
        train=replace(
            train,
            steps=min(train.steps, STEPS),
            gradient_accumulation=min(train.gradient_accumulation, 2),
            mixed_precision="bf16" if on_cpu and train.mixed_precision == "fp16" else train.mixed_precision,
            compile=train.compile and not on_cpu,  # minutes there, for a few steps
        ),
        log=replace(config.log, every=1),
        validation=replace(
            config.validation,
            every=min(config.validation.every, STEPS // 2),
            lpips_net=_net_with_local_backbone(config.validation.lpips_net),
        ),
        checkpoint=replace(config.checkpoint, every=min(config.checkpoint.every, STEPS // 2)),
    )


def replaced(before: Config, after: Config) -> list[str]:
    """What of the recipe is not tested, a line each: sources that are not on this machine, and compilation."""
    pairs = [
        ("data.train", before.data.train, after.data.train),
        ("model.pretrained", before.model.pretrained, after.model.pretrained),
        ("loss.perceptual.net", before.loss.perceptual.net, after.loss.perceptual.net),
        ("validation.lpips_net", before.validation.lpips_net, after.validation.lpips_net),
    ]
    lines = [f"{key}: {old} is not on this machine; {new} instead" for key, old, new in pairs if old != new]
    if before.loss.adversarial.pretrained:
        lines.append("loss.adversarial.pretrained: a small, new discriminator instead")
    if before.train.compile and not after.train.compile:
        lines.append("train.compile: compiling would take minutes on a CPU; not tested here")
    return lines


def _small_data(config: DataConfig) -> DataConfig:
    small = replace(
        config,
        resolution=min(config.resolution, SIDE),
        batch_size=min(config.batch_size, 2),
        num_workers=min(config.num_workers, 1),
        validation_images=min(config.validation_images or 2, 2),
        validation_resolution=config.validation_resolution and min(config.validation_resolution, SIDE),
        shuffle_buffer=min(config.shuffle_buffer, 8),
    )
    sources = [source for source in (config.train, config.validation) if source is not None]
    if all(_is_here(source) or source == SAMPLE_PHOTOGRAPHS for source in sources):
        return small
    return replace(small, train=SAMPLE_PHOTOGRAPHS, validation=SAMPLE_PHOTOGRAPHS, streaming=False)


def _small_network(config: ModelConfig) -> ModelConfig:
    if config.pretrained is not None:
        return config if _is_here(config.pretrained) else ModelConfig(pretrained=COMPACT.name)
    levels = len(config.block_out_channels or (1,))  # AutoencoderKL's default is one level
    widths = (WIDTHS[0], *[WIDTHS[1]] * (levels - 1))
    # a decoder of widths of its own is the narrower one here
    decoder = config.decoder_block_out_channels and (WIDTHS[0],) * levels
    small = {"block_out_channels": widths, "decoder_block_out_channels": decoder, "norm_num_groups": GROUPS}
    return replace(config, **small)


def _early(config: AdversarialConfig) -> AdversarialConfig:
    return replace(
        config,
        disc_start=min(config.disc_start, 2),
        disc_warmup_steps=min(config.disc_warmup_steps, 1),
        ramp_steps=min(config.ramp_steps, 1),
        channels=min(config.channels, 8),
        pretrained=False,  # which is of another size
        r1_every=min(config.r1_every, 2),
    )


def _net_with_local_backbone(net: str) -> str:
    """The net itself if its weights are here, else SqueezeNet, whose 5 MB are soon fetched."""
    return net if backbone_file(net).is_file() else "squeeze"


def _is_here(source: str) -> bool:
    return source == COMPACT.name or Path(source).expanduser().exists()
