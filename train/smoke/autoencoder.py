"""Shrink the recipe of an autoencoder: sources, crops, batch, network, delays of the discriminator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kl_autoencoder.data.locating import SAMPLE_PHOTOGRAPHS, SAMPLES
from kl_autoencoder.evaluation.metrics import backbone_file
from kl_autoencoder.models.packaged import COMPACT, PACKAGED

from ..config import AdversarialConfig, AutoencoderConfig, ModelConfig
from ..data.config import DataConfig

# of the first and of all other levels: they differ, so that there is a shortcut convolution
WIDTHS = (16, 32)
GROUPS = 4  # of each GroupNorm; 16 channels in 4 groups are enough for `model.start: enlargement`
LATENTS = 4  # channels of compact
STATISTICS_SAMPLES = 4  # few, since the scaling factor that they give is thrown away
SIDE = 64  # pixels a side of a crop: a multiple of every downsampling up to 64, and enough for LPIPS


def shrink(config: AutoencoderConfig) -> AutoencoderConfig:
    """Return the same recipe with the sections of this task made small."""
    loss, validation = config.loss, config.validation
    perceptual = replace(loss.perceptual, required=False, net=_net_with_local_backbone(loss.perceptual.net))
    return replace(
        config,
        data=small_data(config.data),
        model=_small_network(config.model),
        loss=replace(
            loss,
            perceptual=perceptual,
            kl=replace(loss.kl, warmup_steps=min(loss.kl.warmup_steps, 2)),
            adversarial=_early(loss.adversarial),
            terms=tuple(map(without_missing_start, loss.terms)),
        ),
        export=replace(config.export, push_to=None, license=None, private=False, dry_run=False),
        validation=replace(validation, lpips_net=_net_with_local_backbone(validation.lpips_net)),
    )


def replaced(before: AutoencoderConfig, after: AutoencoderConfig) -> list[str]:
    """Return a line for each source, model and LPIPS network that was replaced, and a pretrained discriminator."""
    pairs = [
        ("data.train", before.data.train, after.data.train),
        ("model.pretrained", before.model.pretrained, after.model.pretrained),
        ("loss.perceptual.net", before.loss.perceptual.net, after.loss.perceptual.net),
        ("validation.lpips_net", before.validation.lpips_net, after.validation.lpips_net),
    ]
    lines = [f"{key}: {old} is not on this machine; {new} instead" for key, old, new in pairs if old != new]
    if before.loss.adversarial.pretrained:
        lines.append("loss.adversarial.pretrained: a small, new discriminator instead")
    return lines


def small_data(config: DataConfig) -> DataConfig:
    """Shrink crops and batch; sources that are not on this machine become samples that need no download."""
    most = 2 * SIDE if config.buckets else SIDE  # some buckets have sides of half the resolution
    several = tuple(min(side, most * (1 + i)) for i, side in enumerate(config.resolutions))
    small = replace(
        config,
        resolution=several if len(several) > 1 else several[0],
        batch_size=min(config.batch_size, 2),
        num_workers=min(config.num_workers, 1),
        validation_images=min(config.validation_images or 2, 2),
        validation_resolution=config.validation_resolution and min(config.validation_resolution, SIDE),
        shuffle_buffer=min(config.shuffle_buffer, 8),
    )
    sources = [source for source in (config.train, config.validation) if source is not None]
    if all(is_here(source) or source in (SAMPLE_PHOTOGRAPHS, *SAMPLES) for source in sources):
        return small
    small = replace(small, streaming=False)
    if config.label_column is None and config.labels is None:
        return replace(small, train=SAMPLE_PHOTOGRAPHS, validation=SAMPLE_PHOTOGRAPHS)
    digits = replace(small, train=SAMPLES[0], validation=SAMPLES[0], too_small="enlarge")
    return replace(digits, label_column="label", labels=None)


def _small_network(config: ModelConfig) -> ModelConfig:
    if config.pretrained is not None:
        if is_here(config.pretrained):
            return config
        return ModelConfig(pretrained=COMPACT.name, latent_channels=config.latent_channels and 2 * LATENTS)
    levels = len(config.block_out_channels or (1,))  # AutoencoderKL's default is one level
    widths = (WIDTHS[0], *[WIDTHS[1]] * (levels - 1))
    # a decoder that has its own widths is narrower here than the encoder
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
        pretrained=False,  # a pretrained one has another size
        r1_every=min(config.r1_every, 2),
    )


def without_missing_start(part: Any) -> Any:
    """A section of a recipe; if it would continue from a model that is not on this machine, it starts anew."""
    start = getattr(part, "start", None)
    return part if start is None or is_here(start) else replace(part, start=None)


def _net_with_local_backbone(net: str) -> str:
    """`net` if its weights are on this machine, else SqueezeNet, of which 5 MB are quickly downloaded."""
    return net if backbone_file(net).is_file() else "squeeze"


def is_here(source: str) -> bool:
    """Whether a source or model is on this machine: one that comes with the package, or an existing path."""
    return source in PACKAGED or Path(source).expanduser().exists()
