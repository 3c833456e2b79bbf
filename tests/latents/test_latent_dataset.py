"""LatentDataset: draws from the moments that were stored, scaled; set-scaling: into the model's config and back."""

import importlib
import inspect
import json
import re
import shutil

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.latents.latent_dataset import LatentDataset, SameShape, stored_latents
from kl_autoencoder.latents.statistics import LatentStatistics
from kl_autoencoder.models.scaling import READ_BY, SCALING_KEYS, pipelines_of
from kl_autoencoder.networks.distributions import DiagonalGaussian
from tests.latents.test_encode_dataset import encode, tiny

SCALING = {"scaling_factor": 0.5, "shift_factor": 2.0}


def test_each_epoch_draws_anew_from_the_moments(undisturbed):
    dataset = LatentDataset(undisturbed, SCALING)
    posterior = DiagonalGaussian(stored_latents(dataset.rows[7], "moments").double()[None])
    draws = []
    for epoch in range(300):
        dataset.set_epoch(epoch)
        draws.append(dataset[7]["latents"])
    raw = torch.stack(draws).double() / 0.5 + 2
    noise = (raw - posterior.mean) / posterior.std
    assert raw.dtype == torch.float64 and draws[0].dtype == torch.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert noise.mean(0).abs().max() < 5 / 300**0.5  # of every value, not of all together only
    dataset.set_epoch(3)
    assert torch.equal(dataset[7]["latents"], draws[3])
    assert not torch.equal(LatentDataset(undisturbed, SCALING, seed=1)[7]["latents"], draws[0])


def test_a_sample_has_its_size_crop_and_kept_columns(undisturbed):
    dataset = LatentDataset(undisturbed, SCALING)
    sample, row = dataset[3], dataset.rows[3]
    assert (
        sample["original_size"].tolist() == row["original_size"]
        and sample["crop_box"].tolist() == row["crop_box"]
    )
    assert (sample["row"], sample["flipped"], sample["caption"]) == (1, True, "a cat")


def test_batches_are_of_one_shape_and_hold_everything_once(undisturbed):
    dataset = LatentDataset(undisturbed, SCALING)
    batches = SameShape(dataset, 4)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(list(batches))
        assert sorted(i for batch in orders[-1] for i in batch) == list(range(len(dataset)))
        assert len(orders[-1]) == len(batches)
    assert orders[0] != orders[1]
    assert all(len(batch) == 4 for batch in SameShape(dataset, 4, drop_last=True))
    for batch in DataLoader(dataset, batch_sampler=batches):
        assert batch["latents"].ndim == 4 and len(batch["caption"]) == len(batch["latents"]) <= 4


def test_running_workers_take_over_the_new_epoch(undisturbed):
    dataset = LatentDataset(undisturbed, SCALING)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        assert torch.equal(next(iter(loader))["latents"], dataset[0]["latents"])


def test_a_folder_without_a_finished_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set of latents"):
        LatentDataset(tmp_path, SCALING)
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(ValueError, match="not complete"):
        LatentDataset(tmp_path, SCALING)


@pytest.mark.parametrize("per_channel", [False, True])
def test_set_scaling_gives_unit_latents_in_diffusers_too(tmp_path, photographs, per_channel, capsys):
    tiny().save_pretrained(tmp_path / "vae")
    assert encode(tmp_path / "vae", photographs, tmp_path / "out", "--store", "float32") == 0
    more = ["--per-channel"] if per_channel else []
    assert main(["set-scaling", str(tmp_path / "vae"), "--from", str(tmp_path / "out"), *more]) == 0
    assert "scaling_factor" in capsys.readouterr().out
    vae = KLAutoencoder.from_pretrained(tmp_path / "vae")
    z = torch.stack([torch.as_tensor(one["latents"]) for one in LatentDataset(tmp_path / "out", vae.config)])
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    if per_channel:
        assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").config
    assert {key: theirs[key] for key in SCALING_KEYS} == {key: vae.config[key] for key in SCALING_KEYS}
    assert (theirs.latents_std is not None) == per_channel != (theirs.shift_factor is not None)
    # the same weights: the data set goes on
    assert encode(tmp_path / "vae", photographs, tmp_path / "out", "--store", "float32") == 0


@pytest.mark.parametrize("kind, module, cls", [
    ("sd", "stable_diffusion", "StableDiffusionPipeline"),
    ("sdxl", "stable_diffusion_xl", "StableDiffusionXLPipeline"),
    ("sd3", "stable_diffusion_3", "StableDiffusion3Pipeline"), ("flux", "flux", "FluxPipeline"),
])  # fmt: skip
def test_the_scaling_keys_are_those_that_pipelines_read(kind, module, cls):
    """By the source of the installed pipelines themselves."""
    source = inspect.getsource(getattr(importlib.import_module(f"diffusers.pipelines.{module}"), cls))
    assert {key for key in SCALING_KEYS if f"vae.config.{key}" in source} == set(READ_BY[kind][0])


SD, SHIFTED = {"scaling_factor": 0.18215}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PER_CHANNEL = {"scaling_factor": 1.0, "latents_mean": [0.0, 1.0], "latents_std": [1.0, 2.0]}


@pytest.mark.parametrize("config, kinds", [
    (SD, ["sd", "sdxl"]), (SHIFTED, ["sd3", "flux"]), (PER_CHANNEL, ["sdxl"]),
    ({**SHIFTED, **PER_CHANNEL}, ["sdxl"]), ({**SD, "latents_mean": [0.0]}, ["sd", "sdxl"]),
])  # fmt: skip
def test_pipelines_that_scale_latents_as_a_config_says(config, kinds):
    assert pipelines_of(config) == kinds


@pytest.mark.parametrize("arguments, keys, told", [
    ([], {"scaling_factor", "shift_factor"}, "sd3 and flux pipelines read this, sd and sdxl pipelines do not"),
    (["--per-channel"], {"scaling_factor", "latents_mean", "latents_std"}, "sdxl pipelines read this, sd and sd3"),
    (["--for", "sd"], {"scaling_factor"}, "latents of 3 channels; published sd models have 4"),
    (["--for", "sdxl"], {"scaling_factor"}, "read no shift_factor: the scaled latents keep a mean of "),
    (["--for", "sdxl", "--per-channel"], {"scaling_factor", "latents_mean", "latents_std"}, "3 channels"),
    (["--for", "flux"], {"scaling_factor", "shift_factor"}, "latents of 3 channels; published flux models have 16"),
])  # fmt: skip
def test_set_scaling_for_a_kind_of_pipeline(tmp_path, undisturbed, capsys, arguments, keys, told):
    tiny().save_pretrained(tmp_path / "vae")
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    manifest["statistics"]["shift_factor"] = 3.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["set-scaling", str(tmp_path / "vae"), "--from", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr()
    assert told in printed.err
    config = KLAutoencoder.from_pretrained(tmp_path / "vae").config
    assert {key for key in SCALING_KEYS if config[key] is not None} == keys
    if "--for" in arguments:
        assert arguments[1] in pipelines_of(config) and "wrongly" not in printed.err
    assert main(["info", str(tmp_path / "vae")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert all(len(number) < 12 for number in lines["scaling"].split()[1::2]) and "e+" not in lines["scaling"]
    assert {*lines["scaling"].replace(",", "").split()} >= keys


def test_means_of_channels_are_for_sdxl_alone(tmp_path, undisturbed, capsys):
    tiny().save_pretrained(tmp_path / "vae")
    command = [
        "set-scaling",
        str(tmp_path / "vae"),
        "--from",
        str(undisturbed),
        "--per-channel",
        "--for",
        "sd3",
    ]
    assert main(command) == 2
    assert "allowed: --for sdxl" in capsys.readouterr().err


def test_the_card_decodes_what_it_describes(undisturbed):
    card = (undisturbed / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code.replace("path/to/this/folder", str(undisturbed)), names)
    expected = LatentDataset(undisturbed, SCALING)
    assert torch.equal(names["moments"], stored_latents(expected.rows[0], "moments"))
    manifest = expected.manifest
    assert f"{manifest['rows']} images" in card and manifest["model"]["weights_sha256"][:16] in card
    assert card.count("channel ") >= 3 and "{" not in card.replace(code, "")


def test_data_sets_in_folders_of_one_name_are_told_apart(undisturbed, tmp_path):
    """`datasets` may find either in its cache."""
    for kept in (3, 5):
        shutil.copytree(undisturbed, tmp_path / str(kept) / "whole")
        path = sorted((tmp_path / str(kept) / "whole" / "data").iterdir())[0]
        pq.write_table(pq.read_table(path).slice(0, kept), path)
        rows = datasets.load_dataset(str(tmp_path / str(kept) / "whole"), split="train")
        assert len(rows) == len(LatentDataset(tmp_path / str(kept) / "whole", SCALING))


def test_set_scaling_of_another_model_is_refused(tmp_path, undisturbed, capsys):
    tiny(seed=1).save_pretrained(tmp_path / "other")
    before = (tmp_path / "other" / "config.json").read_bytes()
    assert main(["set-scaling", str(tmp_path / "other"), "--from", str(undisturbed)]) == 2
    assert "other weights" in capsys.readouterr().err
    assert (tmp_path / "other" / "config.json").read_bytes() == before


def test_statistics_of_posteriors_are_those_of_their_draws():
    generator = torch.Generator().manual_seed(0)
    posterior = DiagonalGaussian(torch.randn(4, 6, 5, 7, generator=generator))
    expected, drawn = LatentStatistics(3), LatentStatistics(3)
    expected.update(posterior.mean, posterior.var)
    for _ in range(2000):
        drawn.update(posterior.sample(generator))
    np.testing.assert_allclose(expected.std, drawn.std, rtol=0.01)
    assert LatentStatistics.from_state(json.loads(json.dumps(expected.state()))).std.equal(expected.std)
