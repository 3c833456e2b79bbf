"""Image files and PIL images <-> float32 tensors (B, C, H, W) in [-1, 1], and grids of them to look at.

C is 3, RGB, unless another number of `channels` is asked for: 1, gray, or 4, RGBA.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont
from torch import Tensor

from ..files import replacing
from .colours import MODES, decode, orientation, to_channels
from .formats import WRITERS, check_writable

RUN_BY_GHOSTSCRIPT = ("EPS", "WMF")  # never photographs, and decoding them starts another program
SIXTEEN_BITS_IN_I = ("PNG", "PPM")  # formats whose 16-bit gray Pillow may give as mode I, 0 to 65535
DIFFERENCE_GAIN = 4.0


def load_image(
    source: str | os.PathLike | Image.Image,
    size: int | tuple[int, int] | None = None,
    multiple_of: int = 8,
    channels: int = 3,
) -> Tensor:
    """Read an image: file or PIL image -> (1, channels, H, W), float32 in [-1, 1], sRGB.

    `size`: an int scales the short side to it and crops the centre square; (height, width) scales until both
    are covered and crops the centre; None keeps every pixel. `multiple_of` then pads at the right and bottom
    by reflection up to the next multiple (1: no padding); `image_size(path)` tells the size to crop back to.
    Colours, `channels`, rotation, what is raised: see `open_image`. ValueError for an impossible `size` or
    `multiple_of`.
    """
    image = to_channels(source, channels) if isinstance(source, Image.Image) else open_image(source, channels)
    if size is not None:
        image = _cover(image, *_height_width(size))
    return pad_to_multiple(image_to_tensor(image, channels)[None], multiple_of)


def open_image(source: str | os.PathLike | BinaryIO, channels: int = 3) -> Image.Image:
    """Decode an image file, or a file opened for reading in binary, to an upright PIL image of mode RGB in sRGB.

    EXIF rotation is applied, an embedded colour profile is converted to sRGB, transparency is laid over white,
    16-bit values are rounded to 8 bits; of an animation, or of several pages, the first is taken. `channels`: 1
    gives mode L, and 4 mode RGBA, whose transparency stays as it is (`to_channels`).
    Raises FileNotFoundError if there is no such file, and ValueError, naming the file, if it is not an image,
    damaged or truncated, of 32-bit integers, or holds more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (decompression
    bombs).
    """
    with _opened(source) as image:
        return to_channels(image, channels)


def image_size(source: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """(height, width) in pixels of an image file, upright, without decoding it. Raises as `open_image`."""
    with _opened(source) as image:
        if image.format == "TIFF":
            decode(image)  # PIL turns a TIFF upright itself, at a moment that depends on its version
        upright = orientation(image) < 5
        return (image.height, image.width) if upright else (image.width, image.height)


def image_to_tensor(image: Image.Image, channels: int = 3) -> Tensor:
    """A PIL image of any mode -> (channels, H, W), float32 in [-1, 1]; no resizing, no padding: `to_channels`."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(to_channels(image, channels))))
    # in place: of large images each copy counts
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def tensor_to_images(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) or (C, H, W) in [-1, 1], any floating type and device -> B PIL images.

    C = 1, 3 or 4 gives mode L, RGB or RGBA. Values are clamped to [-1, 1] and rounded to the nearest of 256
    levels. Raises ValueError for another shape and for values that are not finite, which have no colour.
    """
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] not in MODES or not images.numel():
        raise ValueError(
            "images must be (B, C, H, W) or (C, H, W), none of them 0 and C = 1, 3 or 4, "
            f"not {tuple(images.shape)}"
        )
    images = images.detach().float()
    bad = int((~images.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {images.numel()} image values are NaN or infinite; "
            "if the model ran in float16, run it in bfloat16 or float32"
        )
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if images.shape[1] == 1:
        return [Image.fromarray(array) for array in levels[:, 0].cpu().numpy()]
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def save_image(
    images: Tensor | Image.Image, path: str | os.PathLike, size: tuple[int, int] | None = None
) -> list[Path]:
    """Write an image, or each of a batch, and return the paths written.

    `images`: (B, C, H, W) or (C, H, W) as in `tensor_to_images`, or a PIL image. One image is written to
    `path`; B > 1 images to numbered names beside it: `photo.png` -> `photo-000.png`, `photo-001.png` ...
    `size` (height, width) keeps the top left part, which undoes the padding of `load_image`. The suffix says
    the format. A file appears under its name only when it is complete, and replaces one that was there.
    Raises ValueError for an unknown suffix, transparency in a JPEG, a size larger than the image, and as
    `tensor_to_images`.
    """
    path = Path(path)
    check_writable(path)
    pictures = [images] if isinstance(images, Image.Image) else tensor_to_images(images)
    if pictures[0].mode == "RGBA" and WRITERS[path.suffix.lower()]["format"] == "JPEG":
        raise ValueError(f"{path}: JPEG holds no transparency; allowed: .png, .webp, .tif")
    if size is not None:
        pictures = [_top_left(picture, *_height_width(size)) for picture in pictures]
    paths = [path]
    if len(pictures) != 1:
        paths = [path.with_stem(f"{path.stem}-{i:03d}") for i in range(len(pictures))]
    for picture, target in zip(pictures, paths, strict=True):
        with replacing(target) as temporary:
            picture.save(temporary, **WRITERS[path.suffix.lower()])
    return paths


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(..., H, W) -> (..., H', W') with H' and W' the next multiples, reflected at the right and bottom edge.

    The reflection bounces between the edges where the padding is longer than the image. A tensor that fits is
    returned as it is. ValueError if `multiple` is not a positive integer.
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple must be a positive integer, not {multiple!r}")
    for dim in (-2, -1):
        length = images.shape[dim]
        padded = -(-length // multiple) * multiple
        if padded != length:
            images = images.index_select(dim, _reflected(length, padded).to(images.device))
    return images


def cover_box(
    size: tuple[int, int], target: tuple[int, int], x: float = 0.5, y: float = 0.5
) -> tuple[float, float, float, float]:
    """The largest part of an image of `size` (H, W) with the sides' ratio of `target`: (left, top, right, bottom).

    In pixels, not always whole ones. `x`, `y` in [0, 1] say where it lies, of the places there are.
    """
    (height, width), (wanted_height, wanted_width) = size, target
    scale = max(wanted_height / height, wanted_width / width)
    left, top = (width - wanted_width / scale) * x, (height - wanted_height / scale) * y
    if scale == 1:  # whole pixels rather than half a pixel aside, which would have to be interpolated
        return int(left), int(top), int(left) + wanted_width, int(top) + wanted_height
    right, bottom = left + wanted_width / scale, top + wanted_height / scale
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def resize_box(
    image: Image.Image, box: tuple[float, float, float, float], height: int, width: int
) -> Image.Image:
    """The part `box` (left, top, right, bottom) of an image, scaled (bicubic, antialiased) to height and width."""
    if box == (int(box[0]), int(box[1]), int(box[0]) + width, int(box[1]) + height):
        return image.crop(box)
    # Scaling the part alone: the whole of a very long image may not fit into memory once enlarged.
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def difference_image(a: Tensor, b: Tensor, gain: float = DIFFERENCE_GAIN) -> Tensor:
    """|a - b| of two (B, C, H, W) in [-1, 1], amplified: black (-1) where equal, white from 2 / gain on.

    Of RGBA it is opaque, and a difference in the transparency shows in all three colours.
    """
    difference = ((a.float() - b.float()).abs() * gain - 1).clamp(-1, 1)
    if difference.shape[1] < 4:
        return difference
    colours, alpha = difference.split((3, 1), dim=1)
    return torch.cat([colours.maximum(alpha), torch.ones_like(alpha)], dim=1)


def image_grid(columns: Sequence[Tensor], labels: Sequence[str] | None = None, gap: int = 4) -> Image.Image:
    """Lay out images to compare: one row an image of the batch, one column an entry of `columns`.

    `columns`: tensors (B, C, H, W) in [-1, 1], all of one shape, such as original, reconstruction and
    `difference_image`. `labels`: a heading for each column. Raises ValueError if shapes or counts differ.
    """
    if not columns or len({column.shape for column in columns}) != 1:
        raise ValueError(f"columns must be tensors of one shape, not {[tuple(c.shape) for c in columns]}")
    if labels is not None and len(labels) != len(columns):
        raise ValueError(f"{len(labels)} labels for {len(columns)} columns")
    cells = [tensor_to_images(column) for column in columns]
    width, height = cells[0][0].size
    heading = _headings(labels, width) if labels else []
    top = heading[0].height if heading else 0
    grid_size = (len(cells) * (width + gap) - gap, top + len(cells[0]) * (height + gap) - gap)
    grid = Image.new("RGBA" if cells[0][0].mode == "RGBA" else "RGB", grid_size, "white")
    for i, column in enumerate(cells):
        if heading:
            grid.paste(heading[i], (i * (width + gap), 0))
        for j, cell in enumerate(column):
            grid.paste(cell, (i * (width + gap), top + j * (height + gap)))
    return grid


@contextmanager
def _opened(source: str | os.PathLike | BinaryIO) -> Iterator[Image.Image]:
    """The file's PIL image, not yet decoded; a ValueError raised in the block gets the file's name."""
    name = str(getattr(source, "name", "the image")) if hasattr(source, "read") else str(source)
    try:
        image = Image.open(source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except PermissionError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused as a decompression bomb ({error})") from error
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{name}: not an image in a format that can be read") from error
    with image:
        try:
            _refuse_unsafe(image)
            yield image
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _refuse_unsafe(image: ImageFile.ImageFile) -> None:
    """Raise ValueError for a file that must not be decoded, or whose values have no known range."""
    if image.format in RUN_BY_GHOSTSCRIPT:
        raise ValueError(f"{image.format} is not a photograph's format")
    limit = Image.MAX_IMAGE_PIXELS  # PIL itself refuses only from twice its limit on, and warns below
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"refused as a decompression bomb: {image.width}x{image.height} pixels, "
            f"the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    if image.format in ("JPEG", "MPO"):
        _refuse_empty_jpeg(image)
    if image.mode == "I" and image.format not in SIXTEEN_BITS_IN_I:
        raise ValueError(
            "integers of 32 bits, and nothing says which is white; allowed: 8 or 16 bits, or floats from 0 to 1"
        )


def _refuse_empty_jpeg(image: ImageFile.ImageFile) -> None:
    """Raise ValueError for a JPEG of fewer bits than blocks of 8x8 pixels, which decoders would fill in.

    Each block takes at least one bit, the code of its mean.
    """
    file = image.fp
    assert file is not None  # it has just been opened
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    blocks = -(-image.width // 8) * -(-image.height // 8)
    if 8 * size < blocks:
        raise ValueError(
            f"truncated, or no photograph: {size:,} bytes cannot hold {image.width}x{image.height} pixels"
        )


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a positive integer or (height, width), not {size!r}")
    return sides


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bicubic, antialiased) until height and width are covered, and crop the centre."""
    return resize_box(image, cover_box((image.height, image.width), (height, width)), height, width)


def _top_left(image: Image.Image, height: int, width: int) -> Image.Image:
    if height > image.height or width > image.width:
        raise ValueError(f"cannot crop {image.height}x{image.width} (H, W) to {height}x{width}")
    return image.crop((0, 0, width, height))


def _reflected(length: int, padded: int) -> Tensor:
    """Indices 0 .. length-1 and back, again and again, up to `padded` of them."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(padded) % period
    return torch.where(index < length, index, period - index)


def _headings(labels: Sequence[str], width: int) -> list[Image.Image]:
    """Strips of `width` pixels with a centred label, in the largest type of 8 to 20 points that fits them all."""
    for points in range(20, 7, -1):
        font = ImageFont.load_default(points)
        if max(font.getlength(label) for label in labels) <= width:
            break
    strips = [Image.new("RGB", (width, points + 8), "white") for _ in labels]
    for strip, label in zip(strips, labels, strict=True):
        ImageDraw.Draw(strip).text((width / 2, points / 2 + 4), label, "black", font, anchor="mm")
    return strips
