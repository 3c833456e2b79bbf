"""Images and classes that commands read: which ones, in which numbers, and in black and white."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kl_autoencoder.cli.labelled_images import binarised, read_labelled

DIGITS = {"size": 8, "channels": 1, "image_column": "image"}


def test_digits_are_those_of_scikit_learn_spread_evenly():
    found = read_labelled("sample-digits", **DIGITS, limit=75, label_column="label", split="train")
    theirs, places = load_digits(), np.linspace(0, 1499, 75).round().astype(int)
    assert found.classes.tolist() == theirs.target[places].tolist()
    assert found.names == [str(digit) for digit in range(10)]
    wanted = torch.from_numpy(theirs.images[places])[:, None] / 8 - 1  # 16 is white
    assert found.images.shape == (75, 1, 8, 8)
    assert (found.images - wanted).abs().max() <= 1 / 255 + 1e-6  # rounded to 8 bits
    held_out = read_labelled("sample-digits", **DIGITS, limit=999, label_column=None, split="validation")
    assert len(held_out.images) == 297 and held_out.classes is None


@pytest.fixture
def folders(tmp_path):
    for number, kind in enumerate(("pear", "fig", "apple", "fig")):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / kind / f"{number}.png")
    return tmp_path


def test_folders_are_classes_in_sorted_order(folders, capsys):
    (folders / "fig" / "broken.png").write_bytes(b"no picture")
    found = read_labelled(str(folders), 8, 3, 99, "image", None, "validation")
    reds = ((found.images[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert dict(zip(reds, found.classes.tolist(), strict=True)) == {0: 2, 60: 1, 120: 0, 180: 1}
    assert found.names == ["apple", "fig", "pear"]
    assert "skipped" in capsys.readouterr().err
    alone = read_labelled(str(folders / "fig"), 8, 3, 99, "image", None, "validation")
    assert alone.classes is None and len(alone.images) == 2


def test_black_and_white():
    images = torch.tensor([-1.0, -0.1, 0.1, 1.0]).repeat(5000, 1)[:, None, None]
    assert binarised(images, "fixed", 0)[0].flatten().tolist() == [-1, -1, 1, 1]
    drawn = (binarised(images, "dynamic", 0) + 1) / 2
    assert set(drawn.unique().tolist()) == {0, 1}
    shares = drawn.mean((0, 1, 2))
    assert shares[0] == 0 and shares[3] == 1
    torch.testing.assert_close(shares[1:3], torch.tensor([0.45, 0.55]), atol=0.03, rtol=0)
