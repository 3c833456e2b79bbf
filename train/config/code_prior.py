"""The configuration of the task `code_prior`: an autoregressive model of a discrete autoencoder's codes."""

from typing import Literal

from pydantic import Field

from ..data.config import BatchesConfig
from ..settings import choice, key, section
from .run import Config, ValidationConfig


@section
class CodesConfig(BatchesConfig):
    """The images whose codes are learned: centre squares, encoded once as the run starts."""

    train: str = key(
        ..., "the source of the images, or the folder that `encode-dataset --content codes` wrote"
    )
    validation: str | None = key(
        None,
        "a source of held-out images; null holds some of data.train out, chosen by a hash of their names",
    )
    image_column: str = key("image", "of parquet, saved and hub sources")
    split: str = key("train", "the split of a hub or saved source that is trained on")
    validation_split: str = key("validation", "the split of a hub or saved source that is held out")
    resolution: int | None = key(
        None, "side in pixels of the squares; null: the autoencoder's sample_size", low=1, high=8192
    )
    horizontal_flip: bool = key(False, "learn the codes of the mirrored images, too")
    validation_images: int | None = key(
        None,
        "at most so many held-out images are used; null: 64, and at most an eighth of data.train",
        low=1,
        high=10**6,
    )
    label_column: str | None = key(
        None,
        "the column of the classes, whole numbers from 0 on or names, which are numbered in sorted order",
    )
    labels: Literal["folders"] | None = choice(
        None,
        "the class of an image is the folder that it lies in; classes are numbered by sorted folder names",
    )


@section
class PriorConfig:
    """The transformer and the autoencoder whose codes it learns."""

    autoencoder: str = key(..., "the discrete autoencoder: a run's folder, its export, or a hub id")
    classes: int | None = key(
        None, "number of classes of the images; null: the prior is not conditional", low=1, high=10**6
    )
    hidden_size: int = key(128, "width of the transformer", low=1, high=65536)
    layers: int = key(4, "blocks of the transformer", low=1, high=256)
    heads: int = key(4, "attention heads of each block", low=1, high=256)

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"model.hidden_size: {self.hidden_size}; allowed: a multiple of model.heads, {self.heads}"
            )


@section
class PriorValidationConfig(ValidationConfig):
    """Measure held-out images in nats a code, and draw pictures."""

    temperature: float = key(1.0, "of the draws in the pictures", above=0, high=100)


@section
class CodePriorConfig(Config):
    """A run that trains a prior over codes."""

    task: Literal["code_prior"] = choice("code_prior", "what is trained")
    data: CodesConfig = Field()
    validation: PriorValidationConfig = PriorValidationConfig()
    model: PriorConfig = Field()

    def __post_init__(self) -> None:
        sources = [self.data.label_column, self.data.labels]
        if (self.model.classes is None) != (sources == [None, None]) or None not in sources:
            raise ValueError(
                f"model.classes: {self.model.classes} with data.label_column={sources[0]} and data.labels="
                f"{sources[1]}; allowed: null without, a number with one of the two"
            )
