"""compress, decompress and info of a file: what they write equals what the library computes."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from skimage import data

from kl_autoencoder import compress, decompress
from kl_autoencoder.cli.main import main
from kl_autoencoder.codec import container
from tests.codec.damage import damaged


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """A folder `in` with a photograph, and another one in a folder inside it."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    Image.fromarray(data.chelsea()[:70, :90]).save(tmp_path / "in" / "cat.png")
    Image.fromarray(data.coffee()[:64, :64]).save(tmp_path / "in" / "more" / "coffee.png")
    return tmp_path


def test_one_file_and_back(folder, capsys):
    photo, small, back = folder / "in" / "cat.png", folder / "cat.klc", folder / "cat.png"
    assert run("compress", photo, "--quality", 45, "-o", small) == 0
    assert small.read_bytes() == compress(photo, 45)
    assert f"cat.png -> {small}: {small.stat().st_size} bytes, " in capsys.readouterr().out
    assert run("decompress", small, "-o", back) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(back)), np.asarray(decompress(small.read_bytes())))
    assert run("compress", photo, "-o", small) == 2
    assert "exists already" in capsys.readouterr().err


def test_folders(folder, capsys):
    (folder / "in" / "broken.png").write_bytes(b"no picture")
    assert run("compress", folder / "in", "-o", folder / "small", "--bytes", 300) == 2
    assert "1 of 3 photographs could not be read" in capsys.readouterr().err
    files = sorted(
        path.relative_to(folder / "small").as_posix() for path in (folder / "small").rglob("*.klc")
    )
    assert files == ["cat.klc", "more/coffee.klc"]
    assert all(path.stat().st_size <= 300 for path in (folder / "small").rglob("*.klc"))
    assert run("decompress", folder / "small", "-o", folder / "out") == 0
    sizes = {path.name: Image.open(path).size for path in (folder / "out").rglob("*.png")}
    assert sizes == {"cat.png": (90, 70), "coffee.png": (64, 64)}


def test_a_damaged_file_among_several_is_skipped_and_named(folder, capsys):
    assert run("compress", folder / "in", "-o", folder / "small") == 0
    file = folder / "small" / "cat.klc"
    file.write_bytes(damaged(file.read_bytes(), random.Random(0)))
    assert run("decompress", folder / "small", "-o", folder / "out") == 2
    told = capsys.readouterr().err.splitlines()
    assert f"skipped: {file}: " in told[0] and "1 of 2 files could not be decompressed" in told[1]
    assert [path.name for path in (folder / "out").rglob("*.png")] == ["coffee.png"]


def test_files_of_both_packaged_models_in_one_folder(folder):
    assert (
        run("compress", folder / "in" / "cat.png", "-o", folder / "small" / "cat.klc", "--model", "compact")
        == 0
    )
    assert run("compress", folder / "in" / "more" / "coffee.png", "-o", folder / "small" / "coffee.klc") == 0
    assert run("decompress", folder / "small", "-o", folder / "out") == 0
    for path in (folder / "small").iterdir():
        wanted = np.asarray(decompress(path.read_bytes()))
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "out" / f"{path.stem}.png")), wanted)


def test_a_model_without_an_entropy_model_is_named(folder, two_models, capsys):
    photo, small = folder / "in" / "cat.png", folder / "a.klc"
    assert run("compress", photo, "-o", small, "--model", two_models / "first") == 0
    told = f"warning: {two_models / 'first'} has no entropy_model.safetensors: tables fitted to each image"
    assert told in capsys.readouterr().err
    assert container.unpack(small.read_bytes())[0].entropy_hash == b""
    assert run("compress", photo, "-o", small, "--overwrite") == 0
    assert "warning" not in capsys.readouterr().err


def test_info(folder, capsys):
    small = folder / "a.klc"
    small.write_bytes(compress(folder / "in" / "cat.png", 56))
    assert run("info", small, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["width"], facts["height"], facts["bytes"]) == (90, 70, small.stat().st_size)
    assert (facts["quality"], facts["step"], facts["model"]) == (56, 0.5, "compact-codec")
    assert facts["bits_a_pixel"] == pytest.approx(8 * facts["bytes"] / 6300, abs=1e-5)
    assert facts["model_hash"] == container.unpack(small.read_bytes())[0].model_hash.hex()
    assert run("info", small) == 0
    assert "quality       56\n" in capsys.readouterr().out


def test_another_model_is_refused(folder, two_models, capsys):
    small = folder / "a.klc"
    assert run("compress", folder / "in" / "cat.png", "-o", small, "--bpp", 0.5) == 0
    assert run("decompress", small, "-o", folder / "a.png", "--model", two_models / "first") == 2
    assert f"{small}: was made with the model 'compact-codec' of weights " in capsys.readouterr().err
    assert not (folder / "a.png").exists()
