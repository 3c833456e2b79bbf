"""The view `rounding` and the term `rate`: train an autoencoder for a codec that rounds and codes its latents.

The rate takes the place of the KL to a normal distribution: it is the number of bits that a learned prior, the
entropy model, needs for the rounded latents (Ballé et al. 2017, "End-to-end Optimized Image Compression").
"""

import copy
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from kl_autoencoder.codec.context_model import ContextModel
from kl_autoencoder.codec.context_network import ContextNetwork, rounded
from kl_autoencoder.codec.steps import A_HALVING, HIGHEST, LOWEST, UNIT_STEP, step_of
from kl_autoencoder.models.folder import ENTROPY_MODEL
from kl_autoencoder.models.packaged import packaged

from ..settings import Whole, choice, key, section
from .draws import Draws
from .registry import TERMS, VIEWS
from .terms import Term
from .views import View

LARGE = 1e6
FIVE_PASSES = "how many of the first channels are coded in five passes, not two: fewer bits, more time"


@section
class RoundingConfig:
    """Round latents as the codec does, to steps of a quality that is drawn uniformly for each image."""

    kind: Literal["rounding"] = choice("rounding", "the error of rounding latents to the codec's steps")
    how: Literal["noise", "straight_through"] = choice(
        "noise",
        "add uniform noise that is one step wide, or round and let the gradient through as if nothing were rounded",
    )
    lowest: float = key(30.0, "smallest quality that is drawn", low=LOWEST, high=HIGHEST)
    highest: float = key(70.0, "largest quality that is drawn", low=LOWEST, high=HIGHEST)
    deviation: float = key(
        1.0,
        "the codec divides raw latents by this: 1 / scaling_factor of the model",
        above=0,
        high=LARGE,
    )

    def __post_init__(self) -> None:
        if self.lowest > self.highest:
            raise ValueError(
                f"loss.view.lowest: {self.lowest}; allowed: at most loss.view.highest, {self.highest}"
            )


@VIEWS.register(RoundingConfig)
def rounding(config: RoundingConfig, run) -> View:
    """Build the view; the step of quality q is deviation * 2^((UNIT_STEP - q) / A_HALVING), as in the codec."""

    def apply(z: Tensor, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        quality = draws.uniform(config.lowest, config.highest).view(-1, 1, 1, 1)
        step = config.deviation * 2 ** ((UNIT_STEP - quality) / A_HALVING)
        if config.how == "straight_through":
            return (rounded(z.float() / step) * step).to(z.dtype), images
        return z + (step * draws.centred(*z.shape[1:])).to(z.dtype), images

    return apply


@section
class RateConfig:
    """Bits per pixel of the rounded latents, by an entropy model that is trained together with the autoencoder."""

    kind: Literal["rate"] = choice("rate", "bits per pixel of the rounded latents")
    weight: float = key(0.1, "of the bits per pixel, beside the reconstruction", above=0, high=LARGE)
    qualities: tuple[Annotated[Whole, Field(ge=LOWEST, le=HIGHEST)], ...] = key(
        (30, 50, 70), "qualities at which latents are rounded; the term is the mean over these"
    )
    step_power: float = key(
        0.0,
        "bits at a quality count times its step, in deviations, to this power: above 0 they are dear at low "
        "qualities, where each does more for the image",
        low=0,
        high=4,
    )
    deviation: float = key(
        1.0,
        "the codec divides raw latents by this, as in the view; the exported scaling_factor is 1 / deviation",
        above=0,
        high=LARGE,
    )
    start: str | None = key(
        None,
        "continue from the entropy model in this folder, or of a packaged model; it may be for fewer channels or "
        "passes; null: a new entropy model",
    )
    width: int = key(32, "features of the networks of a new entropy model", low=1, high=1024)
    five_passes: int = key(6, FIVE_PASSES, low=0, high=256)

    def __post_init__(self) -> None:
        if not self.qualities:
            raise ValueError("loss.terms.qualities: none; allowed: one or more")


@TERMS.register(RateConfig)
def rate(config: RateConfig, run) -> Term:
    """Build the term; what is exported is its entropy model of the last step, not an average.

    Raises ValueError if the encoder is not trained, since its latents do not change then, and if the view rounds to
    other steps.
    """
    if run.train.decoder_only:
        raise ValueError(
            "loss.terms: rate with train.decoder_only; allowed: where the encoder is trained, too"
        )

    if isinstance(run.loss.view, RoundingConfig) and run.loss.view.deviation != config.deviation:
        raise ValueError(
            f"loss.terms: rate.deviation: {config.deviation}; allowed: that of the view, {run.loss.view.deviation}"
        )

    def learned(channels: int) -> RateNetwork:
        network = entropy_network(config, channels, "loss.terms: rate")
        view = run.loss.view
        network.middles = isinstance(view, RoundingConfig) and view.how == "straight_through"
        return RateNetwork(network, config)

    def bits_a_pixel(bits: Tensor, images: Tensor) -> Tensor:
        return bits.mean() / images[0, 0].numel()

    return Term(
        "rate",
        "latents",
        lambda step: config.weight,
        bits_a_pixel,
        learned=learned,
        save=save_entropy_model,
        scaling_factor=1 / config.deviation,
    )


class RateNetwork(nn.Module):
    """Raw latents (B, C, h, w) -> bits of each image (B,), the mean over qualities; gradients pass the rounding.

    Before the mean, bits are multiplied by the step of their quality, in deviations, to the power `step_power`.
    """

    def __init__(self, network: ContextNetwork, config: RateConfig):
        super().__init__()
        self.network, self.qualities = network, config.qualities
        self.deviation, self.step_power = config.deviation, config.step_power

    def forward(self, z: Tensor) -> Tensor:
        total = torch.zeros(len(z), device=z.device)
        for quality in self.qualities:
            step = step_of(quality)
            symbols = rounded(z.float() / (self.deviation * step))
            of_each = torch.full((len(z),), float(quality), device=z.device)
            total = total + step**self.step_power * self.network(symbols, of_each).sum(dim=(1, 2, 3))
        return total / len(self.qualities)


def save_entropy_model(layer: RateNetwork, folder: Path) -> None:
    """Write the entropy model that was trained with an autoencoder into its exported folder."""
    ContextModel(copy.deepcopy(layer.network)).save(folder / ENTROPY_MODEL)


class EntropyNetworkSettings(Protocol):
    """The keys of both sections that describe an entropy model."""

    start: str | None
    width: int
    five_passes: int


def entropy_network(config: EntropyNetworkSettings, channels: int, section: str) -> ContextNetwork:
    """A new entropy model for latents of `channels` channels, which continues that in the folder `start`, if any.

    One of fewer channels or passes keeps the networks that it has. Raises ValueError, which names the key `start`
    of `section`, if it cannot be read or is for more channels.
    """
    start, five_passes = config.start, min(config.five_passes, channels)
    if start is None:
        return ContextNetwork(channels, config.width, five_passes=five_passes)
    try:
        found = ContextModel.beside(packaged(start))
    except (ValueError, OSError) as error:
        raise ValueError(f"{section}.start: {error}") from error
    if found is None or found.channels > channels:
        held = "no entropy model" if found is None else f"one of {found.channels} channels"
        raise ValueError(
            f"{section}.start: {start!r} holds {held}; allowed: one of up to {channels}, or null"
        )
    network = ContextNetwork(channels, found.network.width, found.middles, five_passes)
    network.start_from(found.network)
    return network
