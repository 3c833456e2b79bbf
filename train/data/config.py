"""`DataConfig`, the section `data` of a configuration: batches, sources, crops, held-out images."""

from typing import Annotated, Literal

from pydantic import Field

from ..settings import Number, Whole, choice, key, section
from .samples import RandomCrops

Resolution = Annotated[Whole, Field(ge=1, le=8192)]


@section
class BatchesConfig:
    """What the data of every task have."""

    batch_size: int = key(8, "images per device and forward pass", low=1, high=10**4)


@section
class DataConfig(BatchesConfig):
    """What is trained on. Sources are folders, files and data sets, see `kl_autoencoder.data.locating.KINDS`."""

    train: str = key(..., "the source of the images: a folder, parquet or webdataset files, a hub id ...")
    validation: str | None = key(
        None,
        "a source of held-out images; null holds some of data.train out, chosen by a hash of their names",
    )
    image_column: str = key(
        "image", "of parquet, saved and hub sources; of webdatasets the suffix, such as jpg"
    )
    label_column: str | None = key(
        None,
        "the column of the classes, whole numbers from 0 on or names, which are numbered in sorted order; of "
        "webdatasets the suffix, such as cls",
    )
    labels: Literal["folders"] | None = choice(
        None,
        "the class of an image of a folder is the name of the folder that it lies in, numbered in sorted order",
    )
    split: str = key("train", "the split of a hub or saved source that is trained on")
    validation_split: str = key("validation", "the split of a hub or saved source that is held out")
    channels: Literal[1, 3, 4] = choice(
        3,
        "images are read as 1, gray; 3, RGB; or 4, RGBA: what the network's in_channels and out_channels are",
    )
    binarize: Literal["fixed", "dynamic"] | None = choice(
        None,
        "make gray images black and white: at a half, or each pixel white by the chance that its gray is, drawn "
        "anew for each sample (Burda et al. 2016); held-out images once",
    )
    resolution: Resolution | tuple[Resolution, ...] = choice(
        256,
        "side in pixels of the square crops; of a list, such as [256, 384, 512], each step has one, all of them in "
        "turn in an order drawn anew, and one that stands there twice is taken twice as often",
    )
    buckets: bool = key(
        False,
        "crops are rectangles of about resolution^2 pixels, as wide and high as each image is nearly itself: the "
        "sizes of `encode-dataset --crop buckets`, one a step; the headers of all images are read at the start",
    )
    num_workers: int = key(
        4, "processes a device that decode; 0 decodes in the training process", low=0, high=1024
    )
    crop_scale: tuple[Annotated[Number, Field(ge=0, le=1)], ...] = key(
        (0.25, 1.0),
        "range of the crop's area as a share of the largest square in the image, as torchvision's "
        "RandomResizedCrop with ratio 1; a crop is at least `resolution` wide; of buckets, the largest rectangle",
    )
    too_small: Literal["skip", "enlarge"] = choice(
        "skip", "leave images out of the training whose short side is below `resolution`, or scale them up"
    )
    horizontal_flip: bool = key(True, "mirror every other crop, by chance")
    validation_images: int | None = key(
        None,
        "at most so many held-out images are looked at; null: 64, and of data.train an eighth at most",
        low=1,
        high=10**6,
    )
    validation_resolution: int | None = key(
        None,
        "side of the held-out images, which are squares; null: resolution, of a list the first",
        low=1,
        high=8192,
    )
    streaming: bool = key(False, "read parquet, webdataset and hub sources in sequence, see `StreamedImages`")
    shuffle_buffer: int = key(
        1000, "samples of a stream that are in memory to be shuffled", low=1, high=10**7
    )

    def __post_init__(self):
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"data.crop_scale: {list(scale)}; allowed: two rising numbers above 0 and up to 1"
            )
        if not self.resolutions:
            raise ValueError("data.resolution: []; allowed: a whole number, or a list of them")
        if self.buckets and self.streaming:
            raise ValueError(
                "data.buckets: true with data.streaming; allowed: false (a stream tells no sizes beforehand)"
            )
        if self.binarize and self.channels != 1:
            raise ValueError(
                f"data.binarize: {self.binarize} with data.channels={self.channels}; allowed: with data.channels=1"
            )
        if self.labels and self.label_column is not None:
            raise ValueError("data.labels: folders beside data.label_column; allowed: one of the two")
        if self.streaming and self.validation is None:
            raise ValueError(
                "data.validation: null with data.streaming; allowed: a source (nothing can be held out of a stream)"
            )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Those of the steps: one, or those of the list."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    def least_resolution(self, side: int) -> int:
        """The least resolution of which no crop has a shorter side: of buckets some have sides of half of it."""
        return side * 2 if self.buckets else side

    @property
    def held_out_side(self) -> int:
        """The side of the held-out images."""
        return self.validation_resolution or self.resolutions[0]

    @property
    def crops(self) -> RandomCrops:
        enlarge = self.too_small == "enlarge"
        return RandomCrops(
            tuple(self.crop_scale), self.horizontal_flip, enlarge, self.channels, self.binarize
        )
