"""Images that declare or hold many pixels: bounded in memory, and refused before they are decoded."""

import io
import re
import resource
import struct

import psutil
import pytest
import torch
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder, image_size, load_image
from kl_autoencoder.cli.main import main
from kl_autoencoder.models import large_images
from kl_autoencoder.models.large_images import memory_needed, prepare_for
from tests.processes import finish, start


def small():
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "mid_block_add_attention": False}
    return KLAutoencoder(**config).eval().requires_grad_(False)


def declaring(width, height):
    """A JPEG of 72x72 whose header says it is larger."""
    file = io.BytesIO()
    Image.fromarray(data.astronaut()[:72, :72]).save(file, "JPEG")
    content = file.getvalue()
    frame = content.index(b"\xff\xc0")  # SOF0: length, precision, height, width
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


def test_a_jpeg_that_declares_more_than_its_bytes_can_hold(tmp_path, capsys):
    path = tmp_path / "huge.jpg"
    path.write_bytes(declaring(9000, 9000))
    for read in (load_image, image_size):
        with pytest.raises(
            ValueError, match=r"huge\.jpg: truncated, or no photograph: [\d,]+ bytes cannot hold 9000x9000"
        ):
            read(path)
    assert main(["reconstruct", str(path), "-o", str(tmp_path / "out.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 1, "optimize": True}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_small_files_of_images_of_one_colour_are_read(options, mode):
    """These are the smallest files that libjpeg writes of an image."""
    file = io.BytesIO()
    Image.new(mode, (3000, 2000)).save(file, "JPEG", **options)
    assert image_size(file) == (2000, 3000)


def test_an_image_too_large_for_the_memory_is_refused_before_it_is_decoded(tmp_path, capsys, monkeypatch):
    """A sound PNG of 81 million pixels on a machine with 4 GB free; a small image beside it is reconstructed."""
    (tmp_path / "in").mkdir()
    Image.new("1", (9000, 9000)).save(tmp_path / "in" / "huge.png")
    Image.fromarray(data.astronaut()[:32, :32]).save(tmp_path / "in" / "small.png")
    monkeypatch.setattr(large_images, "available_host_memory", lambda: 4e9)
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    assert main(["reconstruct", str(tmp_path / "in" / "huge.png"), "-o", str(tmp_path / "out.png")]) == 2
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert re.search(
        r"huge\.png: 9000x9000 pixels need about \d+\.\d GB of memory, and 4\.0 GB are free; --size N", told
    )
    monkeypatch.setattr(large_images, "available_host_memory", lambda: 4e9)
    assert main(["reconstruct", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 2
    assert "skipped: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.png"]


def test_large_images_are_tiled_and_small_ones_are_not():
    vae = small()
    for height, width, tiled in ((2048, 2048, True), (512, 512, False), (100, 50_000, True)):
        prepare_for(vae, height, width)
        assert vae.use_tiling == tiled


def test_the_memory_needed_is_at_most_what_was_foreseen(tmp_path):
    vae = small()
    vae.save_pretrained(tmp_path / "vae")
    photo = Image.fromarray(data.astronaut()).resize((2100, 2000))
    photo.save(tmp_path / "photo.png", compress_level=1)
    arguments = (str(tmp_path / "photo.png"), str(tmp_path / "vae"), str(tmp_path / "out.png"))
    assert finish(start(tmp_path / "log", reconstruct_and_measure, *arguments)) == [0]
    needed = int((tmp_path / "log").read_text().split()[-1])
    foreseen = sum(memory_needed(vae, 2000, 2100))
    assert 0.4 * foreseen < needed < foreseen


def reconstruct_and_measure(photo, model, output):
    # first what any image needs
    main(["reconstruct", "--size", "64", photo, "--model", model, "-o", output])
    before = psutil.Process().memory_info().rss
    code = main(["reconstruct", photo, "--model", model, "-o", output, "--overwrite"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    return code
