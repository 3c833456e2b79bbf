"""Models as codecs: images compressed by a model, and by JPEG, WebP and AVIF to files of the same size."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from PIL import features
from torch import Tensor

from ..codec.public import codec_of
from ..data.image_io import image_to_tensor
from . import baselines
from .methods import FORMATS, Model, Reproduction, Row

# of --codec by default
QUALITIES = (30, 40, 50, 60, 70)
KIND = "codec"  # `Row.kind` of these rows


class Compressed:
    """A model's codec at several qualities, each compared with JPEG, WebP and AVIF.

    These get, for each image, at most the bytes of the model's file. AVIF is left out if Pillow cannot write it.
    """

    def __init__(self, model: Model, qualities: Sequence[int]):
        self.codec = codec_of(model.vae)
        self.others = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]
        self.rows_of = {
            quality: [
                Row(f"{model.name}/codec/q{quality}", curve_of(model.name), f"quality {quality}", KIND),
                *(
                    Row(
                        f"{FORMATS[kind].lower()}/{model.name}/q{quality}",
                        FORMATS[kind],
                        f"in the bytes of {model.name} at quality {quality}",
                        KIND,
                    )
                    for kind in self.others
                ),
            ]
            for quality in qualities
        }

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.rows_of.values() for row in rows]

    def at_middle_quality(self) -> "Compressed":
        """A copy with the middle quality alone (of an even number, the lower of the two)."""
        qualities = sorted(self.rows_of)
        middle, one = qualities[(len(qualities) - 1) // 2], copy(self)
        one.rows_of = {middle: self.rows_of[middle]}
        return one

    def reproduce(self, images: Tensor, numbers: Sequence[int]) -> Iterator[Reproduction]:
        """Yield images (B, 3, H, W) in [-1, 1] as reproduced by each row; `bits_per_pixel` counts whole files."""
        latents = [self.codec.latents(image) for image in images]
        for quality, (own, *others) in self.rows_of.items():
            files = [self.codec.packed(*one, quality) for one in latents]
            decoded = torch.stack([image_to_tensor(self.codec.decompress(file)) for file in files])
            sizes = list(map(len, files))
            yield _reproduction(own, decoded, sizes)
            for row, kind in zip(others, self.others, strict=True):
                found = [
                    baselines.codec(image[None], kind, size)
                    for image, size in zip(images, sizes, strict=True)
                ]
                yield _reproduction(
                    row, torch.cat([pixels for pixels, _ in found]), [size for _, (size,) in found]
                )


def curve_of(model: str) -> str:
    """The name that all rows of a model's codec share; it labels their curve in the plots over the rate."""
    return f"{model}, compressed"


def _reproduction(row: Row, images: Tensor, sizes: list[int]) -> Reproduction:
    """images: (B, 3, H, W), decoded. sizes: bytes of each image's file."""
    pixels = images.shape[2] * images.shape[3]
    return Reproduction(row, images, {"bits_per_pixel": [8 * size / pixels for size in sizes]})
