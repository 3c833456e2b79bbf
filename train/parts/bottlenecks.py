"""The bottlenecks that `model.bottleneck.kind` chooses from: those of `kl_autoencoder.networks.bottlenecks`."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from kl_autoencoder.networks import bottlenecks as library

from ..settings import Whole, choice, key, section
from .registry import BOTTLENECKS

MOST_CODES = 2**20


@section
class KLBottleneckConfig:
    """The Gaussian posterior of a VAE; `loss.kl` has its weight."""

    kind: Literal["kl"] = choice("kl", "a diagonal Gaussian")


@section
class PlainBottleneckConfig:
    """A plain autoencoder: nothing between encoder and decoder."""

    kind: Literal["none"] = choice("none", "latents as the encoder returns them")
    sparsity: float = key(0.0, "weight of the latents' mean absolute value", low=0, high=1e6)


@section
class VQConfig:
    """A learned code book (VQ-VAE)."""

    kind: Literal["vq"] = choice("vq", "the nearest vector of a code book")
    codes: int = key(512, "vectors in the code book", low=2, high=MOST_CODES)
    codebook: Literal["ema", "gradient"] = choice("ema", "moved by averages of its latents, or by a gradient")
    commitment: float = key(0.25, "weight of the latents' distance to their codes", low=0, high=1e6)
    decay: float = key(0.99, "of the averages, a step", low=0, high=1)
    revive_below: float = key(
        0.5,
        "a code with fewer latents a step, on average, is replaced by one of them; 0: never",
        low=0,
        high=1e6,
    )


@section
class FSQConfig:
    """Finite scalar quantisation: no code book is learned."""

    kind: Literal["fsq"] = choice("fsq", "each channel rounded to few values")
    levels: tuple[Annotated[Whole, Field(ge=2, le=2**16)], ...] = key(
        (8, 5, 5, 5), "values of each channel; their product is the number of codes"
    )


@section
class GumbelConfig:
    """The discrete VAE; `loss.kl` weights its KL to equally likely codes."""

    kind: Literal["gumbel"] = choice("gumbel", "a categorical posterior, relaxed by Gumbel-softmax")
    codes: int = key(128, "vectors in the code book", low=2, high=MOST_CODES)
    temperature: float = key(1.0, "of the relaxation at the start", above=0, high=100)
    final_temperature: float = key(0.5, "and at the end of its schedule", above=0, high=100)
    anneal_steps: int = key(1000, "steps of the schedule", low=0, high=10**9)
    hard: bool = key(False, "decode one code, with the gradient of the relaxed one")


@section
class AdversarialBottleneckConfig:
    """The adversarial autoencoder: a discriminator of latents makes their distribution that of a prior."""

    kind: Literal["adversarial"] = choice("adversarial", "a discriminator compares latents with a prior")
    prior: Literal["normal", "mixture", "swiss_roll"] = choice("normal", "the prior")


# What trains the adversarial kind beside the bottleneck is loss.latent_adversarial: see latent_adversary.py.
SECTIONS = (
    PlainBottleneckConfig,
    VQConfig,
    FSQConfig,
    GumbelConfig,
    AdversarialBottleneckConfig,
)


@BOTTLENECKS.register(KLBottleneckConfig)
def kl(config: KLBottleneckConfig, run) -> library.KLBottleneck:
    return library.KLBottleneck(run.loss.kl.free_bits)


def _of_the_library(config: Any, run) -> library.Bottleneck:
    options = bottleneck_options(config)
    try:
        return library.BOTTLENECKS[options.pop("kind")](run.model.latent_channels or 4, **options)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


for _section in SECTIONS:
    BOTTLENECKS.register(_section)(_of_the_library)


def bottleneck_options(config: Any) -> dict[str, Any]:
    """{"kind": ..., options}, as an Autoencoder's config has it."""
    return dataclasses.asdict(config)


def belongs_to_the_model(config: Any) -> bool:
    """Whether the bottleneck is part of the exported model, an `Autoencoder`, rather than of training."""
    return isinstance(config, SECTIONS)
