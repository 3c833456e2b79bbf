"""Small runs of the trainer for tests: their configuration, the trainer, and what they leave behind."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from train.autoencoder.task import AutoencoderTask
from train.config import Config, build
from train.loop.trainer import Trainer


def make(config, statistics_samples=16):
    """A Trainer as in a new process, with the settings that accelerate keeps for a whole process reset.

    `statistics_samples`: crops that the scaling factor is measured from; 16 are quick, and give a rough one.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config, partial(AutoencoderTask, statistics_samples=statistics_samples))


def small_config(photographs, folder, **sections):
    """A configuration that takes a second or two: 5,000 parameters on crops of 32 pixels."""
    values = {
        "output_dir": str(folder),
        "seed": 3,
        "model": {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 2},
        "data": {"train": str(photographs), "validation_images": 4, "resolution": 32,
                 "batch_size": 4, "num_workers": 0},
        "loss": {"perceptual": {"weight": 0.0}},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5},
        "ema": {"decay": 0.9},
        "train": {"steps": 6},
        "log": {"every": 1, "tensorboard": False},
        "validation": {"every": 0, "lpips_net": "squeeze"},
        "checkpoint": {"every": 3},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build(Config, values)


def records(folder, key):
    """The values of a key in a run's metrics.jsonl: step -> value."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder, step, name="model"):
    return load_file(Path(folder) / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_odd_images(folder):
    """Write forty images of several modes, four of them of one pixel and four damaged; return the damaged names."""
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    folder.mkdir()
    for i in range(20):
        Image.fromarray(np.roll(photo, i, axis=1)).save(folder / f"rgb-{i:02}.png")
    for i in range(4):
        rgb = Image.fromarray(np.roll(photo, i, axis=0))
        rgb.convert("L").save(folder / f"grey-{i}.jpg")
        rgb.convert("CMYK").save(folder / f"cmyk-{i}.jpg")
        rgb.resize((1, 1)).save(folder / f"one-pixel-{i}.png")
        rgb.convert("P").convert("RGBA").save(folder / f"alpha-{i}.png")
    whole = (folder / "rgb-00.png").read_bytes()
    damaged = {"cut.png": whole[: len(whole) // 2], "empty.jpg": b"", "page.jpg": b"<html>not found</html>",
               "noise.webp": rng.bytes(500)}  # fmt: skip
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    return list(damaged)
