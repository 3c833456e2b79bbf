"""Crops and buckets: against SDXL's table, PIL's own resizing, and load_image."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from kl_autoencoder.data.crops import TooSmall, buckets, nearest_bucket, read_part
from kl_autoencoder.data.image_io import load_image
from kl_autoencoder.evaluation.metrics import psnr

# Podell et al. 2023, appendix I: the height of each bucket not above 1024, and its widths.
SDXL = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}


def encoded(array, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    file.seek(0)
    return file


def test_buckets_are_those_of_sdxl():
    table = {(height, width) for height, widths in SDXL.items() for width in widths}
    assert set(buckets(1024, 8)) == table | {(width, height) for height, width in table}


@pytest.mark.parametrize(
    "size, multiple", [(256, 8), (512, 8), (320, 8), (200, 8), (8, 8), (64, 16), (96, 4)]
)
def test_buckets_of_other_sizes(size, multiple):
    found = buckets(size, multiple)
    assert (size, size) in found or size == 200
    for height, width in found:
        assert height % multiple == width % multiple == 0 and size / 2 <= min(height, width)
        assert 0.9 * size**2 <= height * width <= size**2 and (width, height) in found


def test_the_nearest_bucket():
    choices = buckets(1024, 8)
    assert nearest_bucket((600, 600), choices) == (1024, 1024)
    assert nearest_bucket((1080, 1920), choices) == (768, 1344)  # 1.778 between 1.75 and 1.909
    assert nearest_bucket((5000, 100), choices) == (2048, 512)


@pytest.mark.parametrize("crop", [np.s_[:300, :451], np.s_[:256, :256], np.s_[:, 40:300]])
def test_the_centre_is_that_of_load_image(crop):
    photo = data.astronaut()[crop]
    part = read_part(encoded(photo), [(128, 128)])
    assert torch.equal(part.images[None], load_image(Image.fromarray(photo), 128))
    assert part.size == photo.shape[:2]


def test_the_box_is_where_the_pixels_come_from():
    photo = data.astronaut()
    for seed in range(4):
        part = read_part(encoded(photo), [(96, 64)], random.Random(seed))
        left, top, right, bottom = part.box
        assert 0 <= left < right <= 512 and 0 <= top < bottom <= 512 and bottom - top == 512
        assert (right - left) / (bottom - top) == pytest.approx(64 / 96)
        again = Image.fromarray(photo).resize((64, 96), Image.Resampling.BICUBIC, box=part.box)
        assert np.array_equal(part.pixels, np.array(again))
    lefts = {read_part(encoded(photo), [(96, 64)], random.Random(seed)).box[0] for seed in range(20)}
    assert len(lefts) == 20 and max(lefts) - min(lefts) > 100


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_large_jpeg_is_decoded_small_and_upright(orientation):
    """Close to decoding all of it: the box is in the upright photograph whatever the size and turn in the file."""
    photo = np.asarray(Image.fromarray(data.astronaut()).resize((1500, 1000)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(photo, "JPEG", quality=95, exif=exif)
    part = read_part(file, [(96, 128), (128, 96)], random.Random(1))
    assert part.size == ((1000, 1500) if orientation == 1 else (1500, 1000))
    full = load_image(file_image(file), multiple_of=1)
    whole = Image.fromarray(((full[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    height, width = part.pixels.shape[:2]
    wanted = whole.resize((width, height), Image.Resampling.BICUBIC, box=part.box)
    wanted = load_image(wanted, multiple_of=1)
    assert psnr(part.images[None], wanted) > 38
    assert psnr(part.images[None].roll(1, 3), wanted) < 30


def file_image(file):
    file.seek(0)
    return Image.open(file)


def test_small_and_truncated_images_are_refused():
    with pytest.raises(TooSmall, match="100x64 pixels, too small for 128x96"):
        read_part(encoded(data.astronaut()[:64, :100]), [(96, 128)])
    broken = io.BytesIO(encoded(data.astronaut(), "JPEG").getvalue()[:4000])
    with pytest.raises(ValueError, match="truncated"):
        read_part(broken, [(96, 128)])
