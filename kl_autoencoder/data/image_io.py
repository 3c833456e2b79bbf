"""Image files and PIL images <-> float32 tensors (B, 3, H, W) in [-1, 1], and grids of them to look at."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageFont
from torch import Tensor

from ..files import replacing
from .formats import WRITERS, check_writable

# EXIF 2.32, tag 0x0112: how to turn an image that was stored with this orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SRGB = ImageCms.createProfile("sRGB")
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # PIL mode -> ICC colour space
RUN_BY_GHOSTSCRIPT = ("EPS", "WMF")  # never photographs, and decoding them starts another program
SIXTEEN_BITS_IN_I = ("PNG", "PPM")  # formats whose 16-bit gray Pillow may give as mode I, 0 to 65535
DIFFERENCE_GAIN = 4.0


def load_image(
    source: str | os.PathLike | Image.Image,
    size: int | tuple[int, int] | None = None,
    multiple_of: int = 8,
) -> Tensor:
    """Read an image: file or PIL image -> (1, 3, H, W), float32 in [-1, 1], sRGB.

    `size`: an int scales the short side to it and crops the centre square; (height, width) scales until both
    are covered and crops the centre; None keeps every pixel. `multiple_of` then pads at the right and bottom
    by reflection up to the next multiple (1: no padding); `image_size(path)` tells the size to crop back to.
    Colours, rotation, what is raised: see `open_image`. ValueError for an impossible `size` or `multiple_of`.
    """
    image = to_rgb(source) if isinstance(source, Image.Image) else open_image(source)
    if size is not None:
        image = _cover(image, *_height_width(size))
    return pad_to_multiple(image_to_tensor(image)[None], multiple_of)


def open_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Decode an image file, or a file opened for reading in binary, to an upright PIL image of mode RGB in sRGB.

    EXIF rotation is applied, an embedded colour profile is converted to sRGB, transparency is laid over white,
    16-bit values are rounded to 8 bits; of an animation, or of several pages, the first is taken.
    Raises FileNotFoundError if there is no such file, and ValueError, naming the file, if it is not an image,
    damaged or truncated, of 32-bit integers, or holds more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (decompression
    bombs).
    """
    with _opened(source) as image:
        return to_rgb(image)


def image_size(source: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """(height, width) in pixels of an image file, upright, without decoding it. Raises as `open_image`."""
    with _opened(source) as image:
        if image.format == "TIFF":
            _decode(image)  # PIL turns a TIFF upright itself, at a moment that depends on its version
        upright = _orientation(image) < 5
        return (image.height, image.width) if upright else (image.width, image.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> upright RGB in sRGB, transparency over white; see `open_image`.

    Single channels of more than 8 bits: modes I;16 and I are read as 0 to 65535, mode F as 0 to 1. A colour
    profile that is broken or belongs to another kind of image is ignored, as browsers do. The pixels of an
    image that is plain RGB already are kept exactly. Raises ValueError for a damaged or truncated image and
    for values outside those ranges.
    """
    _decode(image)
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    alpha = None
    if image.has_transparency_data:  # as a channel, or as a colour key or palette entries beside the pixels
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    image = _to_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    # A new image, so that neither the rotation nor the profile can be applied a second time.
    return Image.fromarray(np.asarray(image))


def image_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image of any mode -> (3, H, W), float32 in [-1, 1]; no resizing, no padding. See `to_rgb`."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))
    # in place: of large images each copy counts
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def tensor_to_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) or (3, H, W) in [-1, 1], any floating type and device -> B PIL images of mode RGB.

    Values are clamped to [-1, 1] and rounded to the nearest of 256 levels. Raises ValueError for another shape
    and for values that are not finite, which have no colour.
    """
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(
            f"images must be (B, 3, H, W) or (3, H, W), none of them 0, not {tuple(images.shape)}"
        )
    images = images.detach().float()
    bad = int((~images.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {images.numel()} image values are NaN or infinite; "
            "if the model ran in float16, run it in bfloat16 or float32"
        )
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def save_image(
    images: Tensor | Image.Image, path: str | os.PathLike, size: tuple[int, int] | None = None
) -> list[Path]:
    """Write an image, or each of a batch, and return the paths written.

    `images`: (B, 3, H, W) or (3, H, W) as in `tensor_to_images`, or a PIL image. One image is written to
    `path`; B > 1 images to numbered names beside it: `photo.png` -> `photo-000.png`, `photo-001.png` ...
    `size` (height, width) keeps the top left part, which undoes the padding of `load_image`. The suffix says
    the format. A file appears under its name only when it is complete, and replaces one that was there.
    Raises ValueError for an unknown suffix, a size larger than the image, and as `tensor_to_images`.
    """
    path = Path(path)
    check_writable(path)
    pictures = [images] if isinstance(images, Image.Image) else tensor_to_images(images)
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
    """|a - b| of two (B, 3, H, W) in [-1, 1], amplified: black (-1) where equal, white from 2 / gain on."""
    return ((a.float() - b.float()).abs() * gain - 1).clamp(-1, 1)


def image_grid(columns: Sequence[Tensor], labels: Sequence[str] | None = None, gap: int = 4) -> Image.Image:
    """Lay out images to compare: one row an image of the batch, one column an entry of `columns`.

    `columns`: tensors (B, 3, H, W) in [-1, 1], all of one shape, such as original, reconstruction and
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
    grid = Image.new("RGB", grid_size, "white")
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


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error ... by format
        raise ValueError(f"damaged or truncated image ({error})") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # EXIF that cannot be parsed says nothing; the pixels may still be sound
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I (0 to 65535) and F (0 to 1) -> L."""
    top = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN fails too
        raise ValueError(
            f"mode {image.mode} with values from {values.min():g} to {values.max():g}, allowed are 0 to {top:g}"
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without transparency -> RGB, through its ICC profile if that one is usable."""
    if image.mode not in PROFILE_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == PROFILE_SPACES[image.mode]:
                converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
                assert converted is not None  # it is None only where the image is changed in place
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


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
