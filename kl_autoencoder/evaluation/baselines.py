"""Baselines for an autoencoder: bicubic scaling down and up; JPEG, WebP and AVIF in so many bytes."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import image_to_tensor, pad_to_multiple, tensor_to_images

QUALITIES = {"JPEG": (1, 95), "WEBP": (0, 100), "AVIF": (0, 100)}  # PIL's ranges; above 95 JPEG only grows
WRITER = {
    "JPEG": {"optimize": True},
    "WEBP": {"method": 4},
    "AVIF": {},
}  # chroma is subsampled, the default of all


def bicubic(images: Tensor, factor: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, scaled down by `factor` and up again: bicubic, antialiased, 8 bits.

    Sides that are no multiple of `factor` are padded by reflection, as for a model, and cropped again.
    """
    height, width = images.shape[2:]
    enlarged = []
    for picture in tensor_to_images(pad_to_multiple(images, factor)):
        small = picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.BICUBIC)
        enlarged.append(image_to_tensor(small.resize(picture.size, Image.Resampling.BICUBIC)))
    return torch.stack(enlarged)[:, :, :height, :width]


def codec(images: Tensor, kind: str, size: int) -> tuple[Tensor, list[int]]:
    """(B, 3, H, W) in [-1, 1] -> the same through files of at most `size` bytes, and their bytes.

    kind: JPEG, WEBP or AVIF.

    Each image at the highest quality that fits; where none does, at the lowest, whose file is larger than `size`.
    """
    files = [_largest_that_fits(picture, kind, size) for picture in tensor_to_images(images)]
    decoded = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))) for file in files]
    tensors = [pixels.permute(2, 0, 1).float() / 127.5 - 1 for pixels in decoded]
    return torch.stack(tensors), [len(file) for file in files]


def _largest_that_fits(picture: Image.Image, kind: str, size: int) -> bytes:
    low, high = QUALITIES[kind]
    best = _encoded(picture, kind, low)
    while low < high:  # the quality `low` fits, or is the lowest
        middle = (low + high + 1) // 2
        file = _encoded(picture, kind, middle)
        if len(file) <= size:
            low, best = middle, file
        else:
            high = middle - 1
    return best


def _encoded(picture: Image.Image, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=quality, **WRITER[kind])
    return file.getvalue()
