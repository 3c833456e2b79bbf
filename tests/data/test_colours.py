"""Images read as gray, RGB or RGBA, against Pillow and numpy, and written again without change."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder.data.colours import to_channels
from kl_autoencoder.data.crops import Crop, read_crop
from kl_autoencoder.data.image_io import difference_image, image_grid, load_image, save_image

RNG = np.random.default_rng(5)
GRAY = RNG.integers(0, 256, (9, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (9, 9), dtype=np.uint16)
COLOURED = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
GLASS = RNG.integers(0, 256, (9, 9, 4), dtype=np.uint8)  # of every transparency
WHOLE = Crop(1.0, 0.0, 0.0, False)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def readings(pixels: np.ndarray, channels: int, tmp_path):
    """The same PNG as the commands read it and as training does: (H, W, C) in 0 .. 255 each."""
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    image = load_image(tmp_path / "a.png", multiple_of=1, channels=channels)
    yield ((image[0].permute(1, 2, 0).double() + 1) * 127.5).numpy()
    yield read_crop(io.BytesIO(encoded(pixels)), (9, 9), WHOLE, channels=channels).astype(float)


def over_white(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([[0.299], [0.587], [0.114]])  # ITU-R BT.601


@pytest.mark.parametrize(
    ("pixels", "channels", "expected", "tolerance"),
    [
        (GRAY, 1, GRAY[..., None], 1e-4),
        (DEEP, 1, DEEP[..., None] / 257, 0.501),
        (COLOURED, 1, luma(COLOURED), 1.0),
        (GLASS, 1, luma(over_white(GLASS)), 2.0),
        (GRAY, 3, GRAY[..., None].repeat(3, 2), 1e-4),
        (GRAY, 4, np.dstack([GRAY, GRAY, GRAY, np.full_like(GRAY, 255)]), 1e-4),
        (DEEP, 4, np.dstack([DEEP / 257] * 3 + [np.full(DEEP.shape, 255)]), 0.501),
        (COLOURED, 4, np.dstack([COLOURED, np.full_like(GRAY, 255)]), 1e-4),
        (GLASS, 4, GLASS, 1e-4),  # the colours as they are under every transparency
    ],
    ids=["gray-1", "16bit-1", "rgb-1", "rgba-1", "gray-3", "gray-4", "16bit-4", "rgb-4", "rgba-4"],
)
def test_each_kind_of_png_in_each_number_of_channels(pixels, channels, expected, tolerance, tmp_path):
    for found in readings(pixels, channels, tmp_path):
        assert found.shape == (9, 9, channels)
        assert np.abs(found - expected).max() <= tolerance


def test_a_gray_image_with_alpha_keeps_both():
    pixels = np.dstack([GRAY, GRAY.T])
    found = np.asarray(to_channels(Image.fromarray(pixels, "LA"), 4))
    assert (found == np.dstack([GRAY, GRAY, GRAY, GRAY.T])).all()


def test_transparency_is_turned_with_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GLASS).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert (np.asarray(to_channels(image, 4)) == np.rot90(GLASS, -1)).all()


def test_colours_under_transparency_do_not_bleed_when_scaled():
    """Pillow weighs colours by their transparency: green that cannot be seen does not colour the red beside it."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (255, 0, 0, 255)
    pixels[:, 4:] = (0, 255, 0, 0)
    found = read_crop(io.BytesIO(encoded(pixels)), (4, 4), WHOLE, channels=4)
    seen = found[found[..., 3] > 0]
    assert len(seen) and (seen[:, 1] == 0).all() and (seen[:, 0] >= 254).all()


@pytest.mark.parametrize("pixels", [GRAY, COLOURED, GLASS], ids=["gray", "rgb", "rgba"])
def test_an_image_is_written_as_it_was_read(pixels, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    image = load_image(tmp_path / "a.png", multiple_of=1, channels=channels)
    save_image(image, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert (np.asarray(written) == pixels).all()


def test_a_jpeg_refuses_transparency(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg: JPEG holds no transparency; allowed: \.png"):
        save_image(torch.zeros(1, 4, 8, 8), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_a_grid_of_rgba_keeps_the_transparency_and_shows_differences_opaque():
    a, b = torch.full((1, 4, 2, 2), -1.0), torch.full((1, 4, 2, 2), -1.0)
    b[:, 3] = -0.75  # differs in the transparency alone
    difference = difference_image(a, b)
    assert difference[:, :3].eq(0).all() and difference[:, 3].eq(1).all()
    grid = np.asarray(image_grid([a, b, difference], gap=0))
    assert grid.shape == (2, 6, 4)
    assert grid[0, 0].tolist() == [0, 0, 0, 0] and grid[0, 2].tolist() == [0, 0, 0, 32]
    assert grid[0, 4].tolist() == [128, 128, 128, 255]
