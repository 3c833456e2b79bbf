"""Baselines for an autoencoder: bicubic scaling down and up; JPEG, WebP and AVIF at a given file size."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import image_to_tensor, pad_to_multiple, tensor_to_images

# PIL's ranges of quality; Pillow advises against JPEG above 95, which grows without looking better.
QUALITIES = {"JPEG": (1, 95), "WEBP": (0, 100), "AVIF": (0, 100)}
# PIL's options of each format; chroma is subsampled, as by default in all three
WRITER = {"JPEG": {"optimize": True}, "WEBP": {"method": 4}, "AVIF": {}}


def bicubic(images: Tensor, factor: int) -> Tensor:
    """Scale images (B, 3, H, W) in [-1, 1] down by `factor` and up again: bicubic, antialiased, in 8 bits.

    Sides that are not multiples of `factor` are padded by reflection first, as for a model, and cropped at the end.
    """
    height, width = images.shape[2:]
    enlarged = []
    for picture in tensor_to_images(pad_to_multiple(images, factor)):
        small = picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.BICUBIC)
        enlarged.append(image_to_tensor(small.resize(picture.size, Image.Resampling.BICUBIC)))
    return torch.stack(enlarged)[:, :, :height, :width]


def codec(images: Tensor, kind: str, size: int) -> tuple[Tensor, list[int]]:
    """Compress each image to at most `size` bytes and decode it: (decoded images, bytes of each file).

    images: (B, 3, H, W) in [-1, 1]. kind: JPEG, WEBP or AVIF. Each image has the highest quality that fits. If none
    fits, it has the lowest quality, and its file is larger than `size`.
    """
    files = [_best_that_fits(picture, kind, size) for picture in tensor_to_images(images)]
    decoded = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))) for file in files]
    tensors = [pixels.permute(2, 0, 1).float() / 127.5 - 1 for pixels in decoded]
    return torch.stack(tensors), [len(file) for file in files]


def _best_that_fits(picture: Image.Image, kind: str, size: int) -> bytes:
    """The file of the highest quality that takes at most `size` bytes, by bisection; else that of the lowest."""
    low, high = QUALITIES[kind]
    best = _encoded(picture, kind, low)
    while low < high:  # `best` has quality `low`, which fits or is the lowest
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
