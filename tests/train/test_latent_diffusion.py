"""The task `latent_diffusion`: losses with closed forms, pictures from noise, a folder for plain diffusers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image
from safetensors.torch import load_file

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from tests.conftest import ROOT
from train.config import LatentDiffusionConfig, build, load_config
from train.diffusion.latents import Latents
from train.diffusion.objective import PATHS, spread_times, squared_error
from train.diffusion.pipeline import with_normalised_latents
from train.diffusion.task import LatentDiffusionTask
from train.loop.trainer import Trainer
from train.parts import Draws
from train.smoke import STEPS, shrink

SIDE = 32  # pixels of the pictures; latents of 8x8x2


def tiny_vae(**changes):
    """An untrained autoencoder whose latents are far from mean 0 and deviation 1."""
    torch.manual_seed(1)
    config = {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 2,
        "sample_size": SIDE,
    }
    vae = KLAutoencoder(**config | {"down_block_types": ("DownEncoderBlock2D",) * 3} |
                        {"up_block_types": ("UpDecoderBlock2D",) * 3} | changes)  # fmt: skip
    if vae.quant_conv is not None:
        with torch.no_grad():
            vae.quant_conv.bias[:2] = torch.tensor([3.0, -1.0])
            vae.quant_conv.bias[2:] = -12.0
            vae.quant_conv.weight[:2] *= 4
    return vae.eval()


def encoded(folder, count=4, content="mode", classes=True, **options):
    """A data set of latents of `count` pictures of noise, each of a class of its own, and the model's folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        files.append(str(folder / f"{i:02}.png"))
        Image.fromarray(pixels).save(files[-1])
    table = datasets.Dataset.from_dict({"image": files, "label": list(range(count))})
    table.cast_column("image", datasets.Image()).to_parquet(folder / "pictures.parquet")
    tiny_vae().save_pretrained(folder / "vae")
    kept = ["--keep", "label"] if classes else []
    command = ["encode-dataset", "--model", folder / "vae", "--data", folder / "pictures.parquet",
               "--size", SIDE, "--content", content, "--store", "float32", "--workers", 0, *kept,
               "-o", folder / "latents"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    return folder / "latents"


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("latents"))


def config(latents, folder, **sections):
    values = {
        "task": "latent_diffusion",
        "output_dir": str(folder),
        "data": {"train": str(latents), "batch_size": 4, "label_column": "label"},
        "model": {"hidden_size": 64, "layers": 2, "heads": 2},
        "ema": {"decay": 0.98},
        "log": {"tensorboard": False},
        "validation": {"every": 0, "inference_steps": 3},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build(LatentDiffusionConfig, values)


def make(configuration):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(configuration, LatentDiffusionTask)


# ------------------------------------------------------------------ known answers


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_flow_loss_of_the_optimal_predictor_on_a_gaussian(deviation, t):
    """z ~ N(0, s^2): E[e - z | x] = (t - (1 - t) s^2) x / v, v = (1 - t)^2 s^2 + t^2; what is left is s^2 / v."""
    generator = torch.Generator().manual_seed(0)
    z = deviation * torch.randn(400, 4, 8, 8, generator=generator)
    noise = torch.randn(400, 4, 8, 8, generator=generator)
    noisy = PATHS["flow"]()(z, noise, torch.full((400,), t))
    variance = (1 - t) ** 2 * deviation**2 + t**2
    optimal = (t - (1 - t) * deviation**2) / variance * noisy.latents
    loss = squared_error(optimal, noisy.target).mean().item()
    assert loss == pytest.approx(deviation**2 / variance, rel=0.02)
    assert noisy.timestep.tolist() == pytest.approx([1000 * t] * 400)
    worse = squared_error(optimal + 0.1 * noisy.latents, noisy.target).mean().item()
    assert worse == pytest.approx(deviation**2 / variance + 0.01 * variance, rel=0.02)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_v_loss_of_the_optimal_predictor_on_a_gaussian(t):
    """z ~ N(0, s^2): given x_t the variance of v is s^2 / (a^2 s^2 + b^2); 1 for s = 1, where the best v is 0."""
    path, generator = PATHS["v"](), torch.Generator().manual_seed(0)
    z, noise = (torch.randn(400, 4, 8, 8, generator=generator) for _ in range(2))
    square = path.scheduler.alphas_cumprod[int(1000 * t)].item()
    for s in (1.0, 2.0):
        noisy = path(s * z, noise, torch.full((400,), t))
        variance = square * s**2 + 1 - square
        optimal = (square * (1 - square)) ** 0.5 * (1 - s**2) / variance * noisy.latents
        loss = squared_error(optimal, noisy.target).mean().item()
        assert loss == pytest.approx(s**2 / variance, rel=0.02)


@pytest.mark.parametrize("name", PATHS)
def test_the_scheduler_of_a_path_leads_from_noise_to_a_gaussian(name):
    """With the optimal predictor for N(0, s^2) what comes out has the deviation s."""
    path, s, x = PATHS[name](), 0.5, torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    path.scheduler.set_timesteps(100)
    for timestep in path.scheduler.timesteps:
        if name == "flow":
            t = timestep.item() / 1000
            optimal = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * x
        else:
            square = path.scheduler.alphas_cumprod[timestep].item()
            optimal = (square * (1 - square)) ** 0.5 * (1 - s**2) / (square * s**2 + 1 - square) * x
        x = path.scheduler.step(optimal, timestep, x).prev_sample
    assert x.std().item() == pytest.approx(s, rel=0.03)


def test_validation_covers_all_times_evenly():
    times = spread_times(50, 4)
    assert times.shape == (50, 4) and times.min() >= 0 and times.max() < 1
    assert torch.histc(times, 10, 0, 1).tolist() == pytest.approx([20] * 10, abs=2)
    assert ((times * 4).long() == torch.arange(4)).all()  # each image in each quarter


@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
def test_an_autoencoder_with_normalised_latents_is_the_same_autoencoder(changes):
    vae, images = tiny_vae(**changes), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.2, 5.0])
    made = with_normalised_latents(vae, mean, std)
    assert type(made) is AutoencoderKL and made.config.scaling_factor == 1
    with torch.no_grad():
        before, after = vae.encode(images).latent_dist, made.encode(images).latent_dist
        mean, std = mean.view(1, 2, 1, 1), std.view(1, 2, 1, 1)
        torch.testing.assert_close(after.mean, (before.mean - mean) / std, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.std, before.std / std, rtol=1e-4, atol=1e-6)
        decoded = vae.decode(before.mean).sample
        torch.testing.assert_close(made.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ the data


@pytest.mark.parametrize("content", ["moments", "mode"])
def test_latents_are_normalised_by_what_was_measured(tmp_path, content):
    """Over the data set each channel has mean 0 and deviation 1; moments give another draw for another sample."""
    data = Latents(str(encoded(tmp_path, 12, content)), "data.train", "label")
    batch = data.read(np.arange(12))
    draws = [Draws(0, torch.arange(first, first + 12), torch.device("cpu")) for first in (0, 12)]
    z, other = (data.normalised(batch["stored"], one) for one in draws)
    assert z.shape == (12, 2, 8, 8) and batch["labels"].tolist() == list(range(12))
    assert z.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert torch.equal(z, other) == (content == "mode")


def test_mistakes_are_named(latents, tmp_path):
    def refused(message, **sections):
        with pytest.raises(ValueError, match=message) as error:
            make(config(sections.pop("folder", latents), tmp_path / "run", **sections))
        assert "\n" not in str(error.value)

    refused("model.hidden_size: 60; allowed: a multiple of 4 x model.heads, 8", model={"hidden_size": 60})
    refused("data.train: nowhere: no data set of latents", folder="nowhere")
    refused("data.label_column: kind is no column .* took along \\(label\\)", data={"label_column": "kind"})
    refused("model.patch_size: 3 for latents of 8x8", model={"patch_size": 3})
    refused("model.autoencoder: 'compact' has other weights", model={"autoencoder": "compact"})
    refused("data.validation_images: 4, to be held out of 4 images", data={"validation_images": 4})
    changed = shutil.copytree(latents, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    del manifest["statistics"]["std"]
    (changed / "manifest.json").write_text(json.dumps(manifest))
    refused("data.train: .*changed has no mean and std of its channels", folder=changed)


# ------------------------------------------------------------------ the run


ALONE = """
import sys, torch
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained(sys.argv[1])
assert pipe.labels["2"] == 2
generator = torch.Generator().manual_seed(5)
made = pipe([0, 1, 2, 3], guidance_scale=1.0, generator=generator, num_inference_steps=20, output_type="pt").images
torch.save(made, sys.argv[2])
assert pipe([0], guidance_scale=3.0, num_inference_steps=2).images[0].size == (32, 32)
assert not {"kl_autoencoder", "train"} & {name.split(".")[0] for name in sys.modules}
"""


def test_a_dit_overfits_four_latents_and_the_pipeline_returns_the_four_pictures(latents, tmp_path):
    """In a process that knows nothing of this package."""
    run = config(
        latents,
        tmp_path / "run",
        data={"batch_size": 16, "validation": str(latents)},
        model={"layers": 1},
        optimizer={"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 10},
        loss={"label_dropout": 0.0},
        train={"steps": 300},
    )
    summary = make(run).fit()
    assert summary["before"]["loss"] == pytest.approx(2, rel=0.1)  # predicts 0: the variance of e - z
    assert summary["after"]["loss"] < 0.25
    made = tmp_path / "pictures.pt"
    apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(summary["export"]), str(made)]
    done = subprocess.run(command, cwd=tmp_path, env=apart, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    vae, data = tiny_vae(), Latents(str(latents), "data.train", "label")
    with torch.no_grad():
        wanted = vae.decode(data.read(np.arange(4))["stored"]).sample / 2 + 0.5
    found = torch.load(made)
    errors = (found[:, None] - wanted.clamp(0, 1)).square().mean(dim=(2, 3, 4))
    assert errors.argmin(dim=1).tolist() == [0, 1, 2, 3]
    others = errors[~torch.eye(4, dtype=torch.bool)].mean()
    assert errors.diagonal().max() < 0.05 * others
    card = (summary["export"] / "README.md").read_text()
    assert f"{summary['after']['loss']:.4f}" in card and "DiTPipeline" in card
    assert str(latents.parent) not in card and str(tmp_path) not in card


@pytest.mark.parametrize("prediction", PATHS)
def test_without_classes_every_label_is_0(latents, tmp_path, prediction):
    run = config(latents, tmp_path / "run", data={"label_column": None}, loss={"prediction": prediction},
                 train={"steps": 2})  # fmt: skip
    pipe = DiTPipeline.from_pretrained(make(run).fit()["export"])
    assert pipe.transformer.config.num_embeds_ada_norm == 1
    expected = {"flow": "flow_prediction", "v": "v_prediction"}[prediction]
    assert pipe.scheduler.config.prediction_type == expected
    assert pipe([0, 0], guidance_scale=1.0, num_inference_steps=2, output_type="np").images.shape == (
        2,
        32,
        32,
        3,
    )


# ------------------------------------------------------------------ the recipes


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/diffusion/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_ends_and_continues(path, latents, tmp_path):
    header = path.read_text().split("\n\n")[0].lower()
    assert all(word in header for word in ("purpose:", "command:", "hardware:", "expected:"))
    recipe = load_config(path, [f"data.train={latents}", "model.autoencoder=null"])
    small = shrink(recipe, tmp_path / "whole")
    make(small).fit()
    name = f"checkpoints/step-{STEPS // 2:06d}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    make(replace(small, output_dir=str(tmp_path / "resumed"))).fit()
    last = f"checkpoints/step-{STEPS:06d}"
    for file in ("model", "ema", "optimizer"):
        whole, resumed = (
            load_file(tmp_path / run / last / f"{file}.safetensors") for run in ("whole", "resumed")
        )
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (tmp_path / "resumed" / "export" / "model_index.json").is_file()
