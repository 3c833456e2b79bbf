"""Image files and PIL images <-> float32 tensors (B, C, H, W) in [-1, 1], and grids of images to compare.

C is 3 (RGB) by default; `channels` selects 1 (gray) or 4 (RGBA).
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

EXTERNAL_DECODER_FORMATS = ("EPS", "WMF")  # Pillow decodes them by another program or the system
UINT16_AS_MODE_I = ("PNG", "PPM")  # their 16-bit gray may be opened as mode I, 0 to 65535
DIFFERENCE_GAIN = 4.0  # default amplification of `difference_image`


def load_image(
    source: str | os.PathLike | Image.Image,
    size: int | tuple[int, int] | None = None,
    multiple_of: int = 8,
    channels: int = 3,
) -> Tensor:
    """Read an image: file or PIL image -> (1, channels, H, W), float32 in [-1, 1], sRGB.

    `size`: an int N scales the short side to N pixels and crops the centre square; (height, width) scales the image
    until it covers both and crops the centre; None keeps every pixel. `multiple_of` then pads the right and bottom
    edge by reflection to the next multiple (1: no padding); to undo the padding, crop to `image_size(path)`.
    `channels`: 1 (gray), 3 (RGB) or 4 (RGBA). Colours, rotation and errors are as in `open_image`; raises
    ValueError also for a `size` or `multiple_of` that is not positive.
    """
    image = to_channels(source, channels) if isinstance(source, Image.Image) else open_image(source, channels)
    if size is not None:
        image = _scale_and_crop(image, *_as_height_width(size))
    return pad_to_multiple(image_to_tensor(image, channels)[None], multiple_of)


def open_image(source: str | os.PathLike | BinaryIO, channels: int = 3) -> Image.Image:
    """Decode an image file (a path, or a file opened in binary mode) to an upright PIL image in sRGB.

    The result has mode RGB by default, mode L for `channels` 1 and mode RGBA for 4. EXIF rotation is applied, an
    embedded colour profile is converted to sRGB, 16-bit values are rounded to 8 bits, and transparency is
    composited over white, except for RGBA, which keeps it. Of an animation or a file of several pages the first
    image is read. Raises FileNotFoundError if there is no such file. Raises ValueError, naming the file, if it is
    not an image, is damaged or truncated, holds 32-bit integers, or holds more than `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (a decompression bomb).
    """
    with _open_checked(source) as image:
        return to_channels(image, channels)


def image_size(source: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Return (height, width) in pixels of an image file once it is upright, from its header (a TIFF is decoded).

    Raises the errors of `open_image`.
    """
    with _open_checked(source) as image:
        if image.format == "TIFF":
            decode(image)  # some versions of Pillow rotate a TIFF only when they decode it
        upright = orientation(image) < 5
        return (image.height, image.width) if upright else (image.width, image.height)


def image_to_tensor(image: Image.Image, channels: int = 3) -> Tensor:
    """A PIL image of any mode -> (channels, H, W), float32 in [-1, 1], at its own size.

    `channels` is 1, 3 or 4. Colours, rotation and errors are as in `to_channels`.
    """
    pixels = torch.from_numpy(np.atleast_3d(np.array(to_channels(image, channels))))
    # In place, since a large image may not fit into memory several times.
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def tensor_to_images(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) or (C, H, W) in [-1, 1], any floating type and device -> B PIL images.

    C = 1, 3 or 4 gives mode L, RGB or RGBA. Values are clamped to [-1, 1] and rounded to the nearest of 256
    levels. Raises ValueError for any other shape and for values that are NaN or infinite.
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
    """Write an image, or each image of a batch, and return the paths written.

    `images`: (B, C, H, W) or (C, H, W) in [-1, 1], as in `tensor_to_images`, or a PIL image. One image is written
    to `path`; B > 1 images are written to numbered names beside it: `photo.png` -> `photo-000.png`, `photo-001.png`
    ... `size` (height, width) crops to the top left part, which undoes the padding of `load_image`. The suffix of
    `path` selects the format. A file appears under its name only once it is complete, and replaces an existing
    file. Raises ValueError for an unknown suffix, RGBA as JPEG, a `size` larger than the image, and for images that
    `tensor_to_images` refuses.
    """
    path = Path(path)
    check_writable(path)
    pictures = [images] if isinstance(images, Image.Image) else tensor_to_images(images)
    if pictures[0].mode == "RGBA" and WRITERS[path.suffix.lower()]["format"] == "JPEG":
        raise ValueError(f"{path}: JPEG holds no transparency; allowed: .png, .webp, .tif")
    if size is not None:
        pictures = [_crop_top_left(picture, *_as_height_width(size)) for picture in pictures]
    paths = [path]
    if len(pictures) != 1:
        paths = [path.with_stem(f"{path.stem}-{i:03d}") for i in range(len(pictures))]
    for picture, target in zip(pictures, paths, strict=True):
        with replacing(target) as temporary:
            picture.save(temporary, **WRITERS[path.suffix.lower()])
    return paths


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad by reflection at the right and bottom edge: (..., H, W) -> (..., H', W'), the next multiples.

    Unlike torch's "reflect", the padding may be longer than the image: it then is reflected at both edges in turn.
    A tensor whose sides are multiples already is returned as it is. Raises ValueError if `multiple` is not a
    positive integer.
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple must be a positive integer, not {multiple!r}")
    for dim in (-2, -1):
        length = images.shape[dim]
        padded = -(-length // multiple) * multiple
        if padded != length:
            images = images.index_select(dim, _reflected_indices(length, padded).to(images.device))
    return images


def cover_box(
    size: tuple[int, int], target: tuple[int, int], x: float = 0.5, y: float = 0.5
) -> tuple[float, float, float, float]:
    """Return the largest box with the aspect ratio of `target` in an image of `size`, both (H, W).

    The box is (left, top, right, bottom) in pixels, in general fractions of pixels. `x` and `y` in [0, 1] place it:
    0 at the left or top edge, 0.5 in the centre, 1 at the right or bottom edge.
    """
    (height, width), (wanted_height, wanted_width) = size, target
    scale = max(wanted_height / height, wanted_width / width)
    left, top = (width - wanted_width / scale) * x, (height - wanted_height / scale) * y
    if scale == 1:  # nothing is scaled: at whole pixels nothing is interpolated either
        return int(left), int(top), int(left) + wanted_width, int(top) + wanted_height
    right, bottom = left + wanted_width / scale, top + wanted_height / scale
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def resize_box(
    image: Image.Image, box: tuple[float, float, float, float], height: int, width: int
) -> Image.Image:
    """Crop `box` (left, top, right, bottom; pixels) and scale it (bicubic, antialiased) to height and width."""
    if box == (int(box[0]), int(box[1]), int(box[0]) + width, int(box[1]) + height):
        return image.crop(box)
    # Only the box is scaled: a very long image, enlarged as a whole, may not fit into memory.
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def difference_image(a: Tensor, b: Tensor, gain: float = DIFFERENCE_GAIN) -> Tensor:
    """Show |a - b| of two image tensors (B, C, H, W) in [-1, 1] as an image of the same shape and range.

    It is clamp(gain * |a - b| - 1, -1, 1): black (-1) where both are equal, white where they differ by 2 / gain or
    more. For RGBA the result is opaque, and a difference in alpha shows in all three colours.
    """
    difference = ((a.float() - b.float()).abs() * gain - 1).clamp(-1, 1)
    if difference.shape[1] < 4:
        return difference
    colours, alpha = difference.split((3, 1), dim=1)
    return torch.cat([colours.maximum(alpha), torch.ones_like(alpha)], dim=1)


def image_grid(columns: Sequence[Tensor], labels: Sequence[str] | None = None, gap: int = 4) -> Image.Image:
    """Lay out images to compare: each image of the batch is a row, each entry of `columns` a column.

    `columns`: tensors (B, C, H, W) in [-1, 1], all of one shape, such as original, reconstruction and
    `difference_image`. `labels`: a heading for each column. `gap`: pixels between images. Raises ValueError if the
    shapes differ, or if there is not one label a column.
    """
    if not columns or len({column.shape for column in columns}) != 1:
        raise ValueError(f"columns must be tensors of one shape, not {[tuple(c.shape) for c in columns]}")
    if labels is not None and len(labels) != len(columns):
        raise ValueError(f"{len(labels)} labels for {len(columns)} columns")
    cells = [tensor_to_images(column) for column in columns]
    width, height = cells[0][0].size
    heading = _draw_headings(labels, width) if labels else []
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
def _open_checked(source: str | os.PathLike | BinaryIO) -> Iterator[Image.Image]:
    """Open an image file without decoding it; a ValueError raised in the `with` block is given the file's name."""
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
    """Raise ValueError for a file that is unsafe to decode, or whose pixel values have no known range."""
    if image.format in EXTERNAL_DECODER_FORMATS:
        raise ValueError(f"{image.format} is not a photograph's format")
    limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns above its limit, and refuses above twice its limit
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"refused as a decompression bomb: {image.width}x{image.height} pixels, "
            f"the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    if image.format in ("JPEG", "MPO"):
        _refuse_empty_jpeg(image)
    if image.mode == "I" and image.format not in UINT16_AS_MODE_I:
        raise ValueError(
            "integers of 32 bits, and nothing says which is white; allowed: 8 or 16 bits, or floats from 0 to 1"
        )


def _refuse_empty_jpeg(image: ImageFile.ImageFile) -> None:
    """Raise ValueError for a JPEG with less than one bit for each block of 8x8 pixels.

    The code of a block's mean takes at least one bit; decoders would fill in the missing blocks.
    """
    file = image.fp
    assert file is not None  # it has just been opened
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    blocks = -(-image.width // 8) * -(-image.height // 8)
    if 8 * size < blocks:
        raise ValueError(
            f"truncated, or no photograph: {size:,} bytes cannot hold {image.width}x{image.height} pixels"
        )


def _as_height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a positive integer or (height, width), not {size!r}")
    return sides


def _scale_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bicubic, antialiased) until the image covers height and width, and crop the centre."""
    return resize_box(image, cover_box((image.height, image.width), (height, width)), height, width)


def _crop_top_left(image: Image.Image, height: int, width: int) -> Image.Image:
    if height > image.height or width > image.width:
        raise ValueError(f"cannot crop {image.height}x{image.width} (H, W) to {height}x{width}")
    return image.crop((0, 0, width, height))


def _reflected_indices(length: int, padded: int) -> Tensor:
    """The first `padded` indices of the sequence 0, 1 ... length-1, length-2 ... 1, 0, 1 ...: (padded,) int64."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(padded) % period
    return torch.where(index < length, index, period - index)


def _draw_headings(labels: Sequence[str], width: int) -> list[Image.Image]:
    """Draw each label, centred, on a strip `width` pixels wide, in the largest font (8 to 20 points) that fits."""
    for points in range(20, 7, -1):
        font = ImageFont.load_default(points)
        if max(font.getlength(label) for label in labels) <= width:
            break
    strips = [Image.new("RGB", (width, points + 8), "white") for _ in labels]
    for strip, label in zip(strips, labels, strict=True):
        ImageDraw.Draw(strip).text((width / 2, points / 2 + 4), label, "black", font, anchor="mm")
    return strips
