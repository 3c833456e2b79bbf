"""A small model, photographs as parquet, and the data set of latents that encode-dataset makes of them."""

import io
import random

import datasets
import pytest
from PIL import Image
from skimage import data

from tests.latents.test_encode_dataset import CAPTIONS, encode, tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vae"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """27 photographs of many shapes with captions; row 5 is damaged, rows 8 to 11 are too small for 32."""
    rows, rng = [], random.Random(0)
    for i in range(27):
        photo = getattr(data, ("astronaut", "chelsea", "coffee")[i % 3])()
        height, width = (10, 200) if 8 <= i < 12 else (rng.randint(40, 95), rng.randint(40, 95))
        file = io.BytesIO()
        Image.fromarray(photo[20 : 20 + height, 10 * i : 10 * i + width]).save(file, "JPEG", quality=95)
        encoded = file.getvalue()[:300] if i == 5 else file.getvalue()
        rows.append({"image": {"bytes": encoded, "path": None}, "caption": CAPTIONS[i % 3], "kind": i % 2})
    kinds = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"), kind=kinds)
    path = tmp_path_factory.mktemp("source") / "photographs.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def undisturbed(model, parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "whole"
    assert encode(model, parquet, folder, "--keep", "caption", "kind", "--flip", "--crop", "buckets") == 0
    return folder
