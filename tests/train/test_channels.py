"""Training on gray and RGBA images, and on images of a few pixels."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.evaluation.metrics import LPIPS
from train.autoencoder.task import AutoencoderTask
from train.config import load_config
from train.loop.trainer import Trainer

RUN = """
output_dir: {folder}/run
model: {{in_channels: {channels}, out_channels: {channels}, block_out_channels: [8, 8], layers_per_block: 1,
        norm_num_groups: 4}}
data: {{train: {folder}/images, channels: {channels}, resolution: {side}, batch_size: 2, num_workers: 0,
       validation_images: 2}}
loss: {{perceptual: {{weight: {perceptual}, net: squeeze}}}}
train: {{steps: 2}}
validation: {{every: 0, lpips_net: squeeze}}
log: {{every: 1, tensorboard: false}}
"""


def run(folder, channels: int, side: int, perceptual: float = 0):
    """Train on a folder of eight PNG of so many channels; the trainer and the lines of its record."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / "images" / f"{i}.png")
    (folder / "a.yaml").write_text(
        RUN.format(folder=folder, channels=channels, side=side, perceptual=perceptual)
    )
    trainer = Trainer(load_config(folder / "a.yaml"), partial(AutoencoderTask, statistics_samples=2))
    trainer.fit()
    return trainer, [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_run_of_gray_and_of_rgba(channels, tmp_path, capsys):
    trainer, lines = run(tmp_path, channels, 32, perceptual=0.5)
    batch = next(iter(trainer.task.data.loader()))
    assert batch["images"].shape == (2, channels, 32, 32) and batch["images"].abs().max() <= 1
    assert all(line["train/perceptual"] > 0 for line in lines if "train/perceptual" in line)
    last = [line for line in lines if "validation/psnr" in line][-1]
    assert {"validation/psnr", "validation/ssim", "validation/lpips"} <= last.keys()
    exported = KLAutoencoder.from_pretrained(tmp_path / "run" / "export")
    assert exported(batch["images"]).sample.shape == batch["images"].shape
    with Image.open(tmp_path / "run/samples/step-000002.png") as picture:
        assert picture.mode == ("RGBA" if channels == 4 else "RGB")
    assert ("transparency is left out" in capsys.readouterr().out) == (channels == 4)


def test_eight_pixels_are_enough_and_what_is_not_measured_is_said_once(tmp_path, capsys):
    _, lines = run(tmp_path, 1, 8)
    measured = [line.keys() for line in lines if "validation/psnr" in line]
    assert measured and not any("validation/ssim" in keys or "validation/lpips" in keys for keys in measured)
    said = capsys.readouterr().out
    assert said.count("validation reports no SSIM: images of 8 pixels, its window has 11") == 1
    assert said.count("validation reports no LPIPS: images of 8 pixels, squeeze needs 17") == 1


def test_lpips_of_gray_is_that_of_its_three_equal_channels_and_of_rgba_that_of_the_colours():
    lpips = LPIPS("squeeze")
    a, b = torch.rand(2, 2, 4, 32, 32) * 2 - 1
    assert lpips(a[:, :1], b[:, :1]).equal(lpips(a[:, :1].repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)))
    assert lpips(a, b).equal(lpips(a[:, :3], b[:, :3]))
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(lpips(a, b).sum(), a)
    assert gradient[:, :3].abs().sum((0, 2, 3)).gt(0).all()
    assert gradient[:, 3].eq(0).all()
