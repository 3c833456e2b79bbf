"""The configuration of the task `entropy_model`, which trains the codec's entropy model."""

from typing import Literal

from pydantic import Field

from kl_autoencoder.codec.steps import HIGHEST, LOWEST

from ..data.config import DataConfig
from ..parts.rounding import FIVE_PASSES
from ..settings import choice, key, section
from .run import Config


@section
class EntropyNetworkConfig:
    """The autoencoder whose latents are coded, and the size of the network that predicts them."""

    pretrained: str = key(
        "compact",
        "the autoencoder: a folder, single file, hub id, or a model in the package, such as compact",
    )
    subfolder: str | None = key(None, "folder in `pretrained` that holds the autoencoder, such as vae")
    start: str | None = key(
        None,
        "continue from the entropy model in this folder, such as `pretrained`'s, or of a packaged model; it may be "
        "for fewer channels or passes; null: a new entropy model",
    )
    width: int = key(32, "features of the network of each pass, of a new entropy model", low=1, high=1024)
    five_passes: int = key(6, FIVE_PASSES, low=0, high=256)


@section
class QualitiesConfig:
    """The qualities at which latents are rounded; a single network serves all of them."""

    lowest: int = key(8, "smallest quality that is drawn", low=LOWEST, high=HIGHEST)
    highest: int = key(HIGHEST, "largest quality that is drawn", low=LOWEST, high=HIGHEST)
    an_image: int = key(3, "number of qualities that are drawn for each image in a step", low=1, high=100)

    def __post_init__(self) -> None:
        if self.lowest > self.highest:
            raise ValueError(
                f"qualities.lowest: {self.lowest}; allowed: at most qualities.highest, {self.highest}"
            )


@section
class EntropyModelConfig(Config):
    """A run that trains the entropy model of the codec, for a given autoencoder."""

    task: Literal["entropy_model"] = choice("entropy_model", "what is trained")
    data: DataConfig = Field()
    model: EntropyNetworkConfig = EntropyNetworkConfig()
    qualities: QualitiesConfig = QualitiesConfig()
