"""The configuration of the task `latent_diffusion`: a diffusion transformer on the latents of a data set."""

from typing import Literal

from pydantic import Field

from ..data.config import BatchesConfig
from ..settings import choice, key, section
from .run import Config, ValidationConfig

MOST_CLASSES = 1000  # diffusers' DiTPipeline uses the label 1000 for "no class"


@section
class LatentsConfig(BatchesConfig):
    """A data set that `kl-autoencoder encode-dataset` wrote; latents are normalised by the statistics in it."""

    train: str = key(..., "a data set of latents: the folder that `encode-dataset` wrote")
    validation: str | None = key(
        None,
        "another data set by the same autoencoder; null holds some of data.train out, by a hash of the names",
    )
    validation_images: int | None = key(
        None,
        "so many images are held out; null: 64, and at most an eighth of data.train",
        low=1,
        high=10**6,
    )
    label_column: str | None = key(
        None,
        "the column of the classes, kept by `encode-dataset --keep`: whole numbers or names; null: no classes",
    )


@section
class DiTConfig:
    """diffusers' DiTTransformer2DModel (Peebles & Xie 2023), and the autoencoder whose latents it learns."""

    autoencoder: str | None = key(
        None, "the one that encoded data.train: folder, file, hub id; null: the one that the data set names"
    )
    patch_size: int = key(2, "side of the patches of latents, each of which is a token", low=1, high=64)
    hidden_size: int = key(192, "width of the transformer", low=1, high=65536)
    layers: int = key(6, "blocks of the transformer", low=1, high=256)
    heads: int = key(3, "attention heads of each block", low=1, high=256)

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads):
            raise ValueError(
                f"model.hidden_size: {self.hidden_size}; allowed: a multiple of 4 x model.heads, {4 * self.heads}"
            )


@section
class DiffusionLossConfig:
    """Mean squared error of what the network predicts."""

    prediction: Literal["flow", "v"] = choice(
        "flow",
        "what the network predicts: noise - latents, on the straight path between them (rectified flow), or v of a "
        "cosine schedule (Salimans & Ho 2022)",
    )
    label_dropout: float = key(
        0.1,
        "share of samples that are trained without their class, for classifier-free guidance",
        low=0,
        high=1,
    )


@section
class DiffusionValidationConfig(ValidationConfig):
    """Measure the loss of held-out latents, and make pictures by the pipeline."""

    inference_steps: int = key(30, "steps in which the pipeline makes a picture", low=1, high=1000)
    guidance_scale: float = key(
        1.0, "classifier-free guidance of the pictures, if there are classes; 1: none", low=1, high=100
    )


@section
class LatentDiffusionConfig(Config):
    """A run that trains a diffusion model on latents."""

    task: Literal["latent_diffusion"] = choice("latent_diffusion", "what is trained")
    data: LatentsConfig = Field()
    validation: DiffusionValidationConfig = DiffusionValidationConfig()
    model: DiTConfig = DiTConfig()
    loss: DiffusionLossConfig = DiffusionLossConfig()
