"""`DataConfig`, the section `data` of a configuration: sources, batches, crops, held-out images."""

from typing import Annotated, Literal

from pydantic import Field

from ..settings import Number, Whole, choice, key, section
from .samples import RandomCrops

Resolution = Annotated[Whole, Field(ge=1, le=8192)]


@section
class BatchesConfig:
    """The keys of `data` that every task has."""

    batch_size: int = key(8, "images per device and forward pass", low=1, high=10**4)


@section
class DataConfig(BatchesConfig):
    """The images to train on and to validate with. `kl_autoencoder.data.locating.KINDS` lists possible sources."""

    train: str = key(..., "the source of the images: a folder, parquet or webdataset files, a hub id ...")
    validation: str | None = key(
        None,
        "the source of the held-out images; null: some images of data.train, chosen by a hash of their names",
    )
    image_column: str = key(
        "image",
        "the image column of parquet, saved and hub sources; of webdatasets the suffix of the images, such as jpg",
    )
    label_column: str | None = key(
        None,
        "the column of the classes: whole numbers from 0 on, or names, which are numbered in sorted order; of "
        "webdatasets the suffix of the classes, such as cls",
    )
    labels: Literal["folders"] | None = choice(
        None,
        "folders: the class of an image is the folder that it lies in; folders are numbered in sorted order",
    )
    split: str = key("train", "the split of a hub or saved source that is trained on")
    validation_split: str = key("validation", "the split of a hub or saved source that is held out")
    channels: Literal[1, 3, 4] = choice(
        3,
        "read images as gray (1), RGB (3) or RGBA (4); the network's in_channels and out_channels are the same",
    )
    binarize: Literal["fixed", "dynamic"] | None = choice(
        None,
        "make gray images black and white. fixed: white from half brightness on; dynamic: each pixel is white with "
        "a probability equal to its gray value, drawn anew for each sample (Burda et al. 2016), once for held-out "
        "images",
    )
    resolution: Resolution | tuple[Resolution, ...] = choice(
        256,
        "side in pixels of the square crops. Of a list, such as [256, 384, 512], each step takes one entry; a "
        "cycle of steps takes each once, in an order drawn anew, so an entry given twice is taken twice as often",
    )
    buckets: bool = key(
        False,
        "crops are rectangles of about resolution^2 pixels, of nearly the aspect ratio of each image: the sizes of "
        "`encode-dataset --crop buckets`, one size a step; the headers of all images are read at the start",
    )
    num_workers: int = key(
        4, "worker processes for each device; 0: images are decoded in the training process", low=0, high=1024
    )
    crop_scale: tuple[Annotated[Number, Field(ge=0, le=1)], ...] = key(
        (0.25, 1.0),
        "range of the crop's area, as a share of the largest square in the image (with buckets, of the largest "
        "rectangle of its shape), as in torchvision's RandomResizedCrop with ratio 1; a crop is at least "
        "`resolution` wide",
    )
    too_small: Literal["skip", "enlarge"] = choice(
        "skip",
        "images with a short side below `resolution` are left out of the training (skip) or scaled up (enlarge)",
    )
    horizontal_flip: bool = key(True, "mirror each crop left to right with probability 1/2")
    validation_images: int | None = key(
        None,
        "the largest number of held-out images; null: 64, but at most an eighth of data.train",
        low=1,
        high=10**6,
    )
    validation_resolution: int | None = key(
        None,
        "side in pixels of the held-out images, which are square; null: resolution, or the first of its list",
        low=1,
        high=8192,
    )
    streaming: bool = key(
        False, "read parquet, webdataset or hub sources in sequence, without downloading them first"
    )
    shuffle_buffer: int = key(
        1000, "encoded images of a stream that are kept in memory to be shuffled", low=1, high=10**7
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
        """The sides in pixels of the crops: `resolution` as a tuple."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    def least_resolution(self, side: int) -> int:
        """The resolution from which on no crop has a side below `side`; sides of buckets go down to half."""
        return side * 2 if self.buckets else side

    @property
    def held_out_side(self) -> int:
        """The side in pixels of the held-out images."""
        return self.validation_resolution or self.resolutions[0]

    @property
    def crops(self) -> RandomCrops:
        """How random crops are drawn and read, by these keys."""
        enlarge = self.too_small == "enlarge"
        return RandomCrops(
            tuple(self.crop_scale), self.horizontal_flip, enlarge, self.channels, self.binarize
        )
