"""Data sets that need no download: their images, their splits, and how they are opened."""

import colorsys
import math

import numpy as np
import pytest
from PIL import Image

from kl_autoencoder.data.locating import SAMPLES, locate
from kl_autoencoder.data.samples import tables
from kl_autoencoder.data.samples.drawing import coverage
from kl_autoencoder.data.samples.shapes import HUE, PLACE, ROTATION, SCALE, Shape, draw, shape
from kl_autoencoder.data.sources import Keys, encoded_file, open_source, open_stream

KEYS = Keys("data.train", "data.image_column", "data.label_column")


def pixels(record: dict) -> np.ndarray:
    with Image.open(encoded_file(record, "image")) as image:
        return np.asarray(image)


def opened(name: str, samples: str, *keep: str):
    return open_source(name, KEYS, samples=samples, keep=keep)


# ---------------------------------------------------------------- drawing


def test_a_square_that_covers_parts_of_pixels():
    found = coverage(np.array([[1.25, 1.0], [3.5, 1.0], [3.5, 2.5], [1.25, 2.5]]), 5)
    across, down = np.array([0, 0.75, 1, 0.5, 0]), np.array([0, 1, 0.5, 0, 0])
    assert np.abs(found - np.outer(down, across)).max() < 1e-12


@pytest.mark.parametrize("turned", [False, True])
def test_coverage_of_any_polygon_is_that_of_many_points_in_each_pixel(turned):
    """A star with deep corners, either way round, against 64x64 points a pixel, by crossing numbers."""
    t = np.linspace(0, 2 * math.pi, 10, endpoint=False) + 0.1
    radius = np.where(np.arange(10) % 2, 1.3, 5.7)
    star = np.stack([6.1 + radius * np.cos(t), 5.9 + radius * np.sin(t)], axis=1)
    at = (np.arange(12 * 64) + 0.5) / 64
    x, y = np.meshgrid(at, at)
    inside = np.zeros_like(x, dtype=bool)
    for (ax, ay), (bx, by) in zip(star, np.roll(star, -1, axis=0), strict=True):
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ax + (bx - ax) * (y - ay) / (by - ay))
    expected = inside.reshape(12, 64, 12, 64).mean(axis=(1, 3))
    assert np.abs(coverage(star[::-1] if turned else star, 12) - expected).max() < 0.01


def test_a_polygon_outside_of_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"polygon from -1 to 3; allowed: 0 to 8"):
        coverage(np.array([[-1.0, 0.0], [3.0, 0.0], [3.0, 3.0]]), 8)


@pytest.mark.parametrize(
    ("kind", "area"),
    [(0, 2.0), (1, math.pi / 2)],
    ids=["square", "ellipse"],
)
def test_a_shape_has_its_area_place_and_hue(kind, area):
    for number, hue in enumerate((0.0, 0.25, 0.5)):
        wanted = Shape(kind, 12.3, 10.0 * number, 30.2, 25.7, hue)
        levels = draw(wanted).astype(float)
        share = levels.max(axis=2) / 255
        assert share.sum() == pytest.approx(area * 12.3**2, rel=1e-3)
        y, x = np.mgrid[:64, :64] + 0.5
        centre = (share * x).sum() / share.sum(), (share * y).sum() / share.sum()
        assert centre == pytest.approx((30.2, 25.7), abs=0.01)
        assert colorsys.rgb_to_hsv(*levels[25, 30] / 255) == pytest.approx((hue, 1, 1), abs=0.002)


def test_rotation_turns_the_long_side_of_the_ellipse_clockwise():
    share = draw(Shape(1, 15.0, 30.0, 32.0, 32.0, 0.0))[..., 0] / 255
    y, x = np.mgrid[:64, :64] - 31.5
    spread = np.array([[(share * a * b).sum() for a in (x, y)] for b in (x, y)])
    long_side = np.linalg.eigh(spread)[1][:, 1]
    assert math.degrees(math.atan(long_side[1] / long_side[0])) == pytest.approx(30, abs=0.1)


def test_factors_fill_their_ranges_and_do_not_depend_on_one_another():
    table = np.array([shape(number) for number in range(4000)])
    lows, highs = zip(SCALE, ROTATION, PLACE, PLACE, HUE, strict=True)
    assert (table[:, 1:].min(0) >= lows).all() and (table[:, 1:].max(0) <= highs).all()
    means, spans = (np.array(lows) + highs) / 2, np.array(highs) - lows
    assert np.abs((table[:, 1:].mean(0) - means) / spans).max() < 0.02
    assert np.abs(np.corrcoef(table.T) - np.eye(6)).max() < 0.06
    assert np.abs(np.bincount(table[:, 0].astype(int)) / 4000 - 1 / 3).max() < 0.03


def test_the_shape_of_a_number_never_changes():
    assert shape(0) == pytest.approx(SHAPE_0, rel=1e-12)


SHAPE_0 = (
    0,
    17.53729867822502,
    18.850568531941256,
    32.693595589332865,
    29.679576647095196,
    0.4198466370001327,
)


# ---------------------------------------------------------------- as sources


def test_names_are_those_that_can_be_opened():
    assert set(SAMPLES) == set(tables.SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_image_is_in_both_splits(name):
    splits = [opened(name, samples) for samples in ("train", "validation")]
    names = [set(rows.image_names()) for rows in splits]
    assert [len(found) for found in names] == [len(rows) for rows in splits]
    assert not names[0] & names[1]
    contents = [{pixels(rows[n]["image"]).tobytes() for n in range(min(len(rows), 500))} for rows in splits]
    assert not contents[0] & contents[1]


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    expected = load_digits()
    train, validation = (opened("sample-digits", samples, "label") for samples in ("train", "validation"))
    assert (len(train), len(validation)) == (1500, 297)
    for rows, start in ((train, 0), (validation, 1500)):
        for row in (0, 7, len(rows) - 1):
            assert (np.rint(pixels(rows[row]["image"]) * (16 / 255)) == expected.images[start + row]).all()
            assert rows[row]["label"] == expected.target[start + row]
    assert train.features["label"].names == list("0123456789")


def test_shapes_have_their_factors_beside_them():
    rows = opened("sample-shapes", "train", "kind", "hue", "x")
    for row in (0, 5, 8191):
        factors = shape(row)
        assert (pixels(rows[row]["image"]) == draw(factors)).all()
        assert (rows[row]["kind"], rows[row]["hue"], rows[row]["x"]) == (factors.kind, factors.hue, factors.x)
    assert rows.features["kind"].names == ["square", "ellipse", "heart"]


def test_faces_and_strangers_are_scikit_images_first_and_last_hundred():
    from skimage.data import lfw_subset

    patches = np.rint(lfw_subset() * 255)
    for name, start in (("sample-faces", 0), ("sample-strangers", 100)):
        rows = [row for samples in ("train", "validation") for row in opened(name, samples)]
        found = np.stack([pixels(row["image"]) for row in rows])
        assert (found == patches[start : start + 100]).all()


def test_unknown_columns_and_streaming_of_a_sample_are_refused():
    assert locate("sample-digits", "data.train").kind == "sample"
    with pytest.raises(
        ValueError, match=r"data.label_column: no column 'kind' in sample-digits; allowed: label"
    ):
        opened("sample-digits", "train", "kind")
    with pytest.raises(ValueError, match=r"data.streaming: true, but sample-shapes is read in place"):
        open_stream("sample-shapes", KEYS)
