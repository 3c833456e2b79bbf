"""Held-out images in training: measured as `kl-autoencoder evaluate` measures, each rank with its share."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.image_io import image_grid, image_to_tensor
from kl_autoencoder.evaluation.metrics import LPIPS, MAX_PSNR, from_8_bits, similarity, to_8_bits
from tests.processes import finish, start_ranks
from tests.train.runs import make, records, small_config
from tests.train.test_restart import command, train
from train.autoencoder import validation
from train.autoencoder.validation import HeldOut, measure


class Identity(torch.nn.Module):
    """An autoencoder that reconstructs all of an image, and one value in eight bits too bright."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, images):
        return type("Output", (), {"sample": images + 0.3 / 127.5})  # below half a level


@pytest.fixture
def folder(tmp_path):
    """Five photographs and a white image, 64x64."""
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(data.astronaut()[20 * i : 20 * i + 64, 64:128]).save(tmp_path / "photos" / f"{i}.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "photos" / "white.png")
    return tmp_path / "photos"


def test_equal_images_do_not_make_the_mean_infinite(folder):
    """And a change of less than half a level is none, for LPIPS too: images are compared as they would be saved."""
    held_out = HeldOut(Photographs.open(str(folder), 64), batch_size=4)
    values = measure(Identity(), held_out, LPIPS("squeeze"))
    assert values["psnr"] == [MAX_PSNR] * 6 and math.isfinite(np.mean(values["psnr"]))
    assert values["lpips"] == [0.0] * 6 and values["ssim"] == pytest.approx([1.0] * 6)


def test_eight_bits_are_kept_exactly(folder):
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_8_bits(from_8_bits(levels)).equal(levels)
    held_out = HeldOut(Photographs.open(str(folder), 64), batch_size=4)
    assert [batch.dtype for batch in held_out.eight_bits] == [torch.uint8] * 2
    expected = [image_to_tensor(Image.open(path)) for path in sorted(folder.iterdir())]
    assert torch.cat(list(held_out.batches())).equal(torch.stack(expected))
    assert held_out.first(5).equal(torch.stack(expected[:5]))


def test_pictures_state_the_factor_by_which_the_difference_is_multiplied(tmp_path):
    class TenLevelsTooBright(Identity):
        def forward(self, images):
            return type("Output", (), {"sample": images + 10 / 127.5})

    images = from_8_bits(torch.full((2, 3, 48, 96), 100, dtype=torch.uint8))
    validation.save_pictures(tmp_path / "step.png", TenLevelsTooBright(), images)
    picture = np.asarray(Image.open(tmp_path / "step.png"))
    heading = picture.shape[0] - 2 * 48 - 4
    columns = [picture[heading : heading + 48, 100 * i : 100 * i + 96] for i in range(3)]
    assert [set(column.flat) for column in columns] == [{100}, {110}, {4 * 10}]
    labelled = np.asarray(image_grid([images] * 3, ["original", "reconstruction", "difference x4"]))
    assert heading > 10 and np.array_equal(picture[:heading], labelled[:heading])


def test_training_and_evaluate_give_the_same_numbers(folder, tmp_path):
    """Of a model whose reconstructions leave [-1, 1]: but for what rounds otherwise in another batch."""
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    vae.decoder.conv_out.weight.data *= 30
    vae.save_pretrained(tmp_path / "vae")
    held_out = HeldOut(Photographs.open(str(folder), 64), batch_size=2)
    values = measure(vae.eval(), held_out, LPIPS("squeeze"))
    assert max(validation.reconstruct(vae, batch).abs().max() for batch in held_out.batches()) > 1.2
    arguments = ["--model", str(tmp_path / "vae"), "--data", str(folder), "--size", "64", "--lpips", "squeeze",
                 "--batch-size", "2", "-o", str(tmp_path / "report"), "--study-images", "2"]  # fmt: skip
    assert main(["evaluate", *arguments]) == 0
    results = json.loads((tmp_path / "report" / "metrics.json").read_text())["results"]
    [row] = [row["metrics"] for key, row in results.items() if key.endswith("/mode/float32")]
    for name in ("psnr", "ssim", "lpips"):
        assert np.mean(values[name]) == pytest.approx(row[name]["mean"], rel=1e-4), name


def test_similarity_is_of_saved_images():
    photo = image_to_tensor(Image.fromarray(data.chelsea()[:64, :64]))[None]
    noisy = photo + 0.3 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    saved = from_8_bits(to_8_bits(noisy))
    lpips = LPIPS("squeeze")
    assert similarity(noisy, photo, lpips) == similarity(saved, photo, lpips)
    assert similarity(noisy, photo, None).keys() == {"psnr", "ssim"}


# ------------------------------------------------------------------ ranks


def counted(arguments, log):
    """`python -m train` that writes down how many held-out images this rank has read."""
    original = validation.HeldOut.__init__

    def init(self, photographs, batch_size, rank=0, ranks=1):
        original(self, photographs, batch_size, rank, ranks)
        with log.open("a") as file:
            file.write(json.dumps([rank, len(self)]) + "\n")

    validation.HeldOut.__init__ = init
    return train(arguments)


def test_each_rank_reads_its_share_and_all_give_the_means_of_one(photographs, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    metrics, log = {}, tmp_path / "log.txt"
    for ranks in (1, 2, 3):
        config = small_config(
            photographs, tmp_path / str(ranks), train={"steps": 1}, validation={"batch_size": 2},
            data={"validation": str(folder), "validation_images": 64, "validation_resolution": 64},
        )  # fmt: skip
        counts, arguments = tmp_path / f"counts-{ranks}.jsonl", command(config, tmp_path / "config.yaml")
        assert finish(*start_ranks(ranks, log, counted, arguments, counts)) == [0] * ranks, log.read_text()
        read = dict(map(json.loads, counts.read_text().splitlines()))
        # in batches of two
        assert sum(read.values()) == 6 and max(read.values()) == {1: 6, 2: 3, 3: 3}[ranks]
        names = ("psnr", "ssim", "lpips")
        metrics[ranks] = [records(tmp_path / str(ranks), f"validation/{name}")[0] for name in names]
        # once a run: three runs so far at most
        assert log.read_text().count("skipped held-out image") == ranks
        assert Image.open(tmp_path / str(ranks) / "samples" / "step-000000.png").height > 64
    assert metrics[1] == metrics[2] == metrics[3]


def test_no_readable_held_out_image_is_an_error(photographs, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_text("no")
    config = small_config(photographs, tmp_path / "run", data={"validation": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"data\.validation: no readable images in .*none"):
        make(config)


def test_held_out_images_that_no_memory_holds_are_refused(photographs, tmp_path, monkeypatch):
    config = small_config(photographs, tmp_path / "run", data={"validation_images": 9})
    monkeypatch.setattr("train.autoencoder.size.device_memory", lambda device: 10**9)
    assert make(config).task.held_out_images == 9
    monkeypatch.setattr("train.autoencoder.size.check_weights", lambda *_: None)
    monkeypatch.setattr("train.autoencoder.size.check_step", lambda *_: None)
    monkeypatch.setattr("train.autoencoder.size.device_memory", lambda device: 9 * 3 * 32**2 - 1)
    with pytest.raises(ValueError, match="data.validation_images: 9 of 32x32 would need 27.6 kB a rank"):
        make(config)
