"""`kl-autoencoder augment`: its files, their names and content, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_io import load_image, pad_to_multiple, tensor_to_images


@pytest.fixture
def digits(tmp_path):
    """Two classes of gray images of 10x9 and a model of gray images whose posterior is narrow."""
    rng = np.random.default_rng(0)
    for folder, count in (("0", 3), ("1", 2)):
        (tmp_path / "digits" / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (10, 9), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "digits" / folder / f"{i}.png")
    torch.manual_seed(0)
    vae = KLAutoencoder(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "model")
    return tmp_path


def run(folder, *more):
    arguments = [
        "augment",
        str(folder / "digits"),
        "--model",
        str(folder / "model"),
        "-o",
        str(folder / "out"),
    ]
    return main([*arguments, *more])


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_variants_lie_in_the_folders_of_their_classes(digits, capsys):
    assert run(digits, "--each", "2") == 0
    assert capsys.readouterr().out == f"{digits / 'out'}: 10 noise, 10 between, of 5 images\n"
    names = [f"{i}-{kind}-{n}.png" for i in range(3) for kind in ("noise", "between") for n in range(2)]
    wanted = {f"0/{name}" for name in names} | {f"1/{name}" for name in names if name[0] != "2"}
    made = contents(digits / "out")
    assert made.keys() == wanted and len(set(made.values())) == 20
    for name in wanted:
        with Image.open(digits / "out" / name) as image:
            assert image.mode == "L" and image.size == (9, 10)


def test_without_noise_a_variant_is_the_reconstruction_and_a_seed_gives_the_same_files(digits):
    assert run(digits, "--kinds", "noise", "--strength", "0") == 0
    vae = KLAutoencoder.from_pretrained(digits / "model").eval()
    image = load_image(digits / "digits/1/1.png", multiple_of=1, channels=1)
    with torch.no_grad():
        expected = tensor_to_images(vae(pad_to_multiple(image, 2)).sample[:, :, :10, :9])[0]
    with Image.open(digits / "out/1/1-noise-0.png") as made:
        assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).max() <= 1
    assert run(digits, "--seed", "5", "--overwrite") == 0
    first = contents(digits / "out")
    assert run(digits, "--seed", "5", "--overwrite") == 0 and contents(digits / "out") == first
    assert run(digits, "--seed", "6", "--overwrite") == 0 and contents(digits / "out") != first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "0-noise-0.png: exists already; --overwrite replaces it"),
        (["--kinds", "drawn"], "digits: drawn: the model knows no classes; allowed: noise, between"),
        (["--kinds", "noisy"], "invalid choice: 'noisy'"),
        (["--strength", "-1"], "--strength: -1.0; allowed: from 0 on"),
        (["-o", "DIGITS/more"], "whose images it would be among; allowed: elsewhere"),
    ],
)
def test_refused_commands_leave_every_file_as_it_was(digits, more, message, capsys):
    (digits / "out" / "0").mkdir(parents=True)
    (digits / "out" / "0" / "0-noise-0.png").write_bytes(b"mine")
    before = contents(digits)
    assert run(digits, *[word.replace("DIGITS", str(digits / "digits")) for word in more]) == 2
    assert message in capsys.readouterr().err
    assert contents(digits) == before


def test_a_gray_model_reads_gray_in_the_other_commands_too(digits, capsys):
    """reconstruct, interpolate and anomaly of images of one channel, and of a data set in the package."""
    model, one = str(digits / "model"), str(digits / "digits/0/0.png")
    assert main(["reconstruct", one, "--model", model, "-o", str(digits / "r.png")]) == 0
    with Image.open(digits / "r.png") as image:
        assert image.mode == "L" and image.size == (9, 10)
    assert main(["interpolate", one, one, "--steps", "2", "--model", model, "-o", str(digits / "i.png")]) == 0
    command = ["anomaly", model, "--reference", "sample-faces", "--data", "sample-strangers", "--size", "24"]
    assert main([*command, "-o", str(digits / "s.csv")]) == 0
    assert len((digits / "s.csv").read_text().splitlines()) == 1 + 80
    assert "80 photographs against 80 of the reference, 24x24" in capsys.readouterr().out
