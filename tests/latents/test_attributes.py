"""Attributes from a column of a table, where the answer is known: a linear autoencoder, pictures of two numbers."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kl_autoencoder import Autoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.latents.attributes import rows_of_kinds

SIDE, ROWS = 8, 60
NAN = float("nan")


@pytest.mark.parametrize(
    "values, plus, minus",
    [
        ([True, False, True], [0, 2], [1]),
        ([-1, 1, -1, 1], [1, 3], [0, 2]),  # as CelebA's own list has it
        ([0, 1, None, 0], [1], [0, 3]),
        ([0.1, 0.9, NAN, 0.2, 0.7], [1, 4], [0, 3]),
        ([2, 0, 1, 2, 2], [0, 3, 4], [1, 2]),  # none is above the median
        (list(range(100)), [50, 66, 83, 99], [0, 16, 33, 49]),
    ],
)
def test_rows_with_and_without(values, plus, minus):
    assert rows_of_kinds(values, limit=4) == (plus, minus)


@pytest.mark.parametrize(
    "values, told", [(["yes", "no"], "'yes'; allowed: numbers"), ([1, 1, None], "1 different values")]
)
def test_columns_that_are_no_attribute_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        rows_of_kinds(values, limit=4)


def halves_model(folder):
    """A linear autoencoder of gray pictures: two latents, the mean of the left half and of the right half."""
    model = Autoencoder(network="mlp", hidden_sizes=[], in_channels=1, out_channels=1, latent_channels=2,
                        sample_size=SIDE, bottleneck={"kind": "none"})  # fmt: skip
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    halves = torch.stack([left, 1 - left]).flatten(1)  # (2, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.conv_out.weight.copy_(halves / halves.sum(1, keepdim=True))
        model.decoder.conv_out[0].weight.copy_(halves.T)
    model.save_pretrained(folder)


def picture(left, right):
    pixels = np.full((SIDE, SIDE), left, np.uint8)
    pixels[:, SIDE // 2 :] = right
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A parquet file in CelebA's layout. Its left halves are brighter where Smiling; (rows, Smiling, pixels)."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    smiling, young = rng.random(ROWS) < 0.4, rng.random(ROWS) < 0.7
    pixels = np.stack([60 + 40 * smiling, 100 + 20 * young], axis=1) + rng.integers(0, 20, (ROWS, 2))
    images = [{"bytes": picture(*two), "path": f"{n:06d}.jpg"} for n, two in enumerate(pixels)]
    columns = {"image": images, "celeb_id": list(range(ROWS)), "Smiling": smiling, "Young": young}
    columns["names"] = [str(n) for n in range(ROWS)]
    pq.write_table(pa.table(columns), "celeba.parquet", row_group_size=16)
    (tmp_path / "photo.png").write_bytes(picture(80, 120))
    halves_model("model")
    return smiling, pixels


def test_a_column_of_celeba_moves_what_it_names(table):
    smiling, pixels = table
    given = ["photo.png", "--model", "model", "--data", "celeba.parquet", "--column", "Smiling"]
    assert main(["attribute", *given, "--strength", "-1", "0", "2", "-o", "strip.png"]) == 0
    strip = np.asarray(Image.open("strip.png").convert("L")).astype(int)[-SIDE:]
    shift = pixels[smiling].mean(0) - pixels[~smiling].mean(0)
    cells = np.split(strip[:, : 3 * (SIDE + 4) - 4], [SIDE, SIDE + 4, 2 * SIDE + 4, 2 * SIDE + 8], axis=1)[
        ::2
    ]
    for strength, cell in zip((-1, 0, 2), cells, strict=True):
        left, right = np.array([80, 120]) + strength * shift
        assert (
            np.abs(cell[:, : SIDE // 2] - left).max() <= 1 and np.abs(cell[:, SIDE // 2 :] - right).max() <= 1
        )


def test_a_column_that_cannot_be_used_is_named(table, capsys):
    given = ["attribute", "photo.png", "--model", "model", "--data", "celeba.parquet", "-o", "strip.png"]
    assert main([*given, "--column", "names"]) == 2
    assert "--column: 'names' of celeba.parquet: '0'; allowed: numbers" in capsys.readouterr().err
    assert main([*given, "--column", "Smilling"]) == 2
    assert "--column" in capsys.readouterr().err
