"""Configure and build the bottlenecks of `kl_autoencoder.networks.bottlenecks` (`model.bottleneck.kind`)."""

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

    kind: Literal["kl"] = choice("kl", "a diagonal Gaussian posterior")


@section
class PlainBottleneckConfig:
    """A plain autoencoder: nothing between encoder and decoder."""

    kind: Literal["none"] = choice("none", "latents as the encoder returns them")
    sparsity: float = key(0.0, "weight of the latents' mean absolute value", low=0, high=1e6)


@section
class VQConfig:
    """A learned code book (VQ-VAE)."""

    kind: Literal["vq"] = choice("vq", "each latent vector is replaced by the nearest code of a code book")
    codes: int = key(512, "vectors in the code book", low=2, high=MOST_CODES)
    codebook: Literal["ema", "gradient"] = choice(
        "ema", "how codes are learned: as moving averages of their latents, or by gradient"
    )
    commitment: float = key(0.25, "weight of the latents' squared distance to their codes", low=0, high=1e6)
    decay: float = key(0.99, "of the moving averages, a step", low=0, high=1)
    revive_below: float = key(
        0.5,
        "a code with fewer latents a step, on average, is replaced by a latent; 0: never",
        low=0,
        high=1e6,
    )


@section
class FSQConfig:
    """Finite scalar quantisation: no code book is learned."""

    kind: Literal["fsq"] = choice("fsq", "each channel is rounded to a few values")
    levels: tuple[Annotated[Whole, Field(ge=2, le=2**16)], ...] = key(
        (8, 5, 5, 5), "number of values of each channel; their product is the number of codes"
    )


@section
class GumbelConfig:
    """The discrete VAE; `loss.kl` weights its KL to a uniform distribution over the codes."""

    kind: Literal["gumbel"] = choice("gumbel", "a categorical posterior, relaxed by Gumbel-softmax")
    codes: int = key(128, "vectors in the code book", low=2, high=MOST_CODES)
    temperature: float = key(1.0, "of the relaxation at the start", above=0, high=100)
    final_temperature: float = key(0.5, "of the relaxation from step anneal_steps on", above=0, high=100)
    anneal_steps: int = key(
        1000, "steps over which the temperature goes to final_temperature", low=0, high=10**9
    )
    hard: bool = key(
        False, "decode a single code, with the gradient of the relaxed mixture (straight through)"
    )


@section
class AdversarialBottleneckConfig:
    """The adversarial autoencoder: training against a discriminator gives latents the distribution of a prior.

    The keys of that discriminator are `loss.latent_adversarial`; it is trained by
    `train/autoencoder/adversarial/latent_adversary.py`.
    """

    kind: Literal["adversarial"] = choice("adversarial", "a discriminator compares latents with a prior")
    prior: Literal["normal", "mixture", "swiss_roll"] = choice("normal", "the distribution of the latents")


# the bottlenecks that are part of the exported model
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
    """A bottleneck's section as a dict, {"kind": ..., option: value}, as in the config of an `Autoencoder`."""
    return dataclasses.asdict(config)


def belongs_to_the_model(config: Any) -> bool:
    """Whether the bottleneck is part of the exported model, which then is an `Autoencoder`; a KL one is not."""
    return isinstance(config, SECTIONS)
