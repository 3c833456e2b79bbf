"""The baselines (bicubic, JPEG, WebP) against torch and PIL on the same images."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from kl_autoencoder.evaluation import baselines
from kl_autoencoder.evaluation.metrics import to_8_bits


@pytest.fixture(scope="module")
def images():
    """(2, 3, 96, 88) of 8 bits."""
    photos = np.stack([data.astronaut()[100:196, 180:268], data.coffee()[100:196, 200:288]])
    return torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1


def test_bicubic_is_that_of_torch(images):
    small = F.interpolate(images, scale_factor=1 / 8, mode="bicubic", antialias=True, align_corners=False)
    small = to_8_bits(small).float() / 127.5 - 1
    expected = F.interpolate(small, scale_factor=8, mode="bicubic", antialias=True, align_corners=False)
    levels = to_8_bits(expected).int() - to_8_bits(baselines.bicubic(images, 8)).int()
    assert levels.abs().max() <= 4 and levels.float().abs().mean() < 0.3  # PIL rounds between both directions


def test_bicubic_keeps_any_size(images):
    odd = images[:, :, :75, :61]
    assert baselines.bicubic(odd, 8).shape == odd.shape
    assert (
        baselines.bicubic(odd, 8)[:, :, :64, :48] - baselines.bicubic(images, 8)[:, :, :64, :48]
    ).std() < 0.1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_codecs_take_the_highest_quality_that_fits(images, kind):
    decoded, sizes = baselines.codec(images, kind, 1500)
    for image, result, size in zip(images, decoded, sizes, strict=True):
        picture = Image.fromarray(to_8_bits(image).permute(1, 2, 0).numpy())
        files = {}
        for quality in range(1, 96):
            file = io.BytesIO()
            picture.save(file, kind, quality=quality, **baselines.WRITER[kind])
            files[quality] = file.getvalue()
        highest = max(quality for quality, file in files.items() if len(file) <= 1500)
        assert size == len(files[highest]) <= 1500
        expected = np.asarray(Image.open(io.BytesIO(files[highest])).convert("RGB"))
        assert (to_8_bits(result).permute(1, 2, 0).numpy() == expected).all()


def test_a_size_that_no_file_fits_takes_the_lowest_quality(images):
    _, sizes = baselines.codec(images[:1], "JPEG", 10)
    file = io.BytesIO()
    Image.fromarray(to_8_bits(images[0]).permute(1, 2, 0).numpy()).save(
        file, "JPEG", quality=1, optimize=True
    )
    assert sizes == [len(file.getvalue())]
