"""The task `code_prior`: it learns the codes of images, and what it draws decodes to them."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from kl_autoencoder.cli import loading
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_io import load_image, tensor_to_images
from kl_autoencoder.latents.latent_dataset import LatentDataset
from kl_autoencoder.models.autoencoder import Autoencoder
from kl_autoencoder.models.priors import CodePrior
from tests.train.discrete import Brightness
from train.config import CodePriorConfig, build
from train.loop.trainer import Trainer
from train.prior import task


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Every autoencoder that the task loads is `Brightness`."""
    monkeypatch.setattr(task, "load_model", lambda name, device, dtype: Brightness())


@pytest.fixture
def vqvae(stand_in, monkeypatch, tmp_path):
    """An untrained VQ-VAE of 16 codes, saved in tmp_path / "vqvae"; models are loaded from their folders again."""
    monkeypatch.undo()
    torch.manual_seed(0)
    shape = {"sample_size": 32, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    model = Autoencoder(bottleneck={"kind": "vq", "codes": 16}, **shape)
    model.save_pretrained(tmp_path / "vqvae")
    return model


def config(source, folder, **sections):
    values = {
        "task": "code_prior",
        "output_dir": str(folder),
        "data": {"train": str(source), "batch_size": 4, "validation_images": 4},
        "model": {"autoencoder": "brightness", "hidden_size": 32, "layers": 2},
        "optimizer": {"learning_rate": 3e-3},
        "ema": {"decay": 0.9},
        "log": {"tensorboard": False},
        "validation": {"every": 0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build(CodePriorConfig, values)


def make(configuration):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(configuration, task.CodePriorTask)


def grids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 16, (count, 4, 4))


def write(folder, codes):
    """Pictures whose codes are `codes`, (N, 4, 4)."""
    folder.mkdir()
    for i, grid in enumerate(codes):
        pixels = ((grid + 0.5) * 16).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{i:02}.png")
    return folder


def test_four_grids_are_learned_and_drawn(tmp_path):
    """-log p falls to log(4) / 16 nats a code, which is all that there is to learn; draws are among the four."""
    codes = grids(4)
    source = write(tmp_path / "images", codes)
    run = config(source, tmp_path / "run", data={"validation": str(source)}, train={"steps": 250})
    trainer = make(run)
    assert np.array_equal(trainer.task.codes.held_out.grids.numpy(), codes)
    summary = trainer.fit()
    assert summary["before"]["nll"] == pytest.approx(math.log(16), rel=0.01)
    assert summary["after"]["nll"] == pytest.approx(math.log(4) / 16, rel=0.05)
    assert summary["after"]["bits"] == pytest.approx(summary["after"]["nll"] / math.log(2))
    prior = CodePrior.from_pretrained(summary["export"])
    assert prior.config.autoencoder == "brightness"
    drawn = prior.sample(64, generator=torch.Generator().manual_seed(0)).numpy()
    found = [next((i for i in range(4) if np.array_equal(one, codes[i])), None) for one in drawn]
    assert found.count(None) <= 2 and {0, 1, 2, 3} <= set(found)
    picture = np.asarray(Image.open(summary["picture"]))  # four draws of 32x32 in a row, 4 apart
    assert picture.shape == (32, 4 * 36 - 4, 3)
    assert json.loads((summary["export"] / "training.json").read_text())["step"] == 250


def test_uniform_codes_cost_log_codes(tmp_path):
    """The codes are random: having seen some images says nothing of the others, so that each code costs log 16."""
    source = write(tmp_path / "images", grids(96))
    run = config(source, tmp_path / "run", data={"batch_size": 16, "validation_images": 32},
                 train={"steps": 40}, optimizer={"learning_rate": 1e-3})  # fmt: skip
    after = make(run).fit()["after"]
    assert after["nll"] == pytest.approx(math.log(16), rel=0.03)


def test_labels_choose_what_is_drawn(tmp_path):
    """Dark pictures have the label 0, bright ones 1."""
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.integers(0, 4, (12, 4, 4)), rng.integers(12, 16, (12, 4, 4))])
    folder = write(tmp_path / "images", codes)
    files = [str(path) for path in sorted(folder.iterdir())]
    table = datasets.Dataset.from_dict({"image": files, "label": [0] * 12 + [1] * 12})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "labelled.parquet")
    labelled = {"label_column": "label"}
    run = config(tmp_path / "labelled.parquet", tmp_path / "run", data=labelled, model={"classes": 2},
                 train={"steps": 60})  # fmt: skip
    prior = CodePrior.from_pretrained(make(run).fit()["export"])
    drawn = prior.sample(32, torch.arange(32) % 2, generator=torch.Generator().manual_seed(0)).float()
    means = drawn.mean(dim=(1, 2))
    assert means[::2].max() < 5 and means[1::2].min() > 10
    by_folder = tmp_path / "by_folder"
    for i, path in enumerate(sorted(folder.iterdir())):
        (by_folder / "bd"[i // 12]).mkdir(parents=True, exist_ok=True)
        path.rename(by_folder / "bd"[i // 12] / path.name)
    again = make(config(by_folder, tmp_path / "c", data={"labels": "folders"}, model={"classes": 2}))
    data = again.task.codes.trained
    assert torch.equal(data.labels, (data.grids.float().mean(dim=(1, 2)) > 8).long())
    with pytest.raises(ValueError, match="data.label_column: 1; allowed: whole numbers from 0 to 0"):
        make(config(tmp_path / "labelled.parquet", tmp_path / "b", data=labelled, model={"classes": 1}))


def test_mirrored_images_are_learned_too(tmp_path):
    codes = grids(8)
    run = config(write(tmp_path / "images", codes), tmp_path / "run", data={"horizontal_flip": True})
    held_out = make(run).task.codes.held_out.grids
    assert len(held_out) == 8 and torch.equal(held_out[1::2], held_out[::2].flip(2))


def test_mistakes_are_named(tmp_path, monkeypatch):
    source = write(tmp_path / "images", grids(8))
    with pytest.raises(ValueError, match="model.hidden_size: 33; allowed: a multiple of model.heads, 4"):
        config(source, tmp_path / "run", model={"hidden_size": 33})
    with pytest.raises(
        ValueError, match="model.classes: 3 with data.label_column=None and data.labels=None; allowed"
    ):
        config(source, tmp_path / "run", model={"classes": 3})
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="model.autoencoder: 'compact' has no codes; allowed: one with a discrete"
    ):
        make(config(source, tmp_path / "run", model={"autoencoder": "compact"}))
    with pytest.raises(ValueError, match="model.autoencoder: 'nowhere' cannot be loaded"):
        make(config(source, tmp_path / "run", model={"autoencoder": "nowhere"}))


def test_the_command_draws_from_it(tmp_path, monkeypatch, capsys):
    """Codes of a prior of one grid decode to that grid; a prior of another code book is refused."""
    monkeypatch.setattr(loading, "load_model", lambda name, device, dtype: Brightness())
    only = torch.arange(16).view(4, 4)
    for name, codes in (("prior", 16), ("other", 8)):
        prior = CodePrior(
            codes=codes, height=4, width=4, hidden_size=16, num_layers=1, autoencoder="brightness"
        )
        prior.transformer.position.weight.data = 10 * torch.eye(16)
        prior.transformer.to_logits.weight.data = 100 * torch.eye(codes, 16)  # the code of position i is i
        prior.save_pretrained(tmp_path / name)
    picture = tmp_path / "grid.png"
    command = ["sample", "compact", "--grid", "1", "-o", str(picture), "--prior"]
    assert main([*command, str(tmp_path / "prior")]) == 0
    expected = np.asarray(tensor_to_images(Brightness().decode_indices(only[None]))[0])
    assert np.array_equal(np.asarray(Image.open(picture)), expected)
    capsys.readouterr()
    for words, message in (
        (["other"], "is of 8 codes, compact has 16; allowed: the prior of this model, brightness's"),
        (["prior", "--label", "3"], "--label: 3; allowed: none"),
        (["prior", "--size", "32"], "--prior: beside --fit or --size"),
        (["nowhere"], "no such"),
    ):
        assert main([*command[:-1], "--overwrite", "--prior", str(tmp_path / words[0]), *words[1:]]) == 2
        assert message in capsys.readouterr().err


def test_the_prior_of_a_vqvae_is_trained_and_drawn_from(vqvae, tmp_path):
    """The autoencoder by its own class, from its folder, through both programs."""
    source = write(tmp_path / "images", grids(12))
    run = config(source, tmp_path / "run", model={"autoencoder": str(tmp_path / "vqvae")}, train={"steps": 3})
    trainer = make(run)
    with torch.no_grad():
        wanted = [vqvae.eval().encode_indices(load_image(path)) for path in sorted(source.iterdir())]
    codes = trainer.task.codes
    found = torch.cat([codes.trained.grids, codes.held_out.grids])
    assert sorted(found.tolist()) == sorted(torch.cat(wanted).tolist())
    trainer.fit()
    picture = tmp_path / "grid.png"
    options = ["--prior", str(tmp_path / "run"), "--grid", "2", "-o", str(picture)]
    assert main(["sample", str(tmp_path / "vqvae"), *options]) == 0
    assert Image.open(picture).size == (68, 68)


def test_codes_of_a_data_set_are_those_of_the_images(vqvae, tmp_path, capsys):
    """encode-dataset --content codes, then the prior: the same grids as encoding the images, with their classes."""
    files = [str(path) for path in sorted(write(tmp_path / "images", grids(12)).iterdir())]
    table = datasets.Dataset.from_dict({"image": files, "label": [i % 3 for i in range(12)]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "labelled.parquet")
    command = ["encode-dataset", "--model", tmp_path / "vqvae", "--data", tmp_path / "labelled.parquet",
               "--size", 32, "--content", "codes", "--keep", "label", "--workers", 0,
               "-o", tmp_path / "codes"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    wanted = torch.cat([vqvae.eval().encode_indices(load_image(path)) for path in files])
    share = torch.bincount(wanted.flatten()) / wanted.numel()
    usage = json.loads((tmp_path / "codes" / "manifest.json").read_text())["statistics"]
    assert usage["codes"] == 16 and usage["used"] == int((share > 0).sum())
    assert usage["perplexity"] == pytest.approx(math.exp(torch.special.entr(share).sum()), rel=1e-5)
    assert f"perplexity, is {usage['perplexity']:.1f}" in (tmp_path / "codes" / "README.md").read_text()
    model = {"autoencoder": str(tmp_path / "vqvae"), "classes": 3}
    run = config(tmp_path / "codes", tmp_path / "run", data={"label_column": "label"}, model=model,
                 train={"steps": 2})  # fmt: skip
    trainer = make(run)
    codes = trainer.task.codes
    labels = torch.cat([codes.trained.labels, codes.held_out.labels])
    assert len(codes.held_out.grids) == 4 and sorted(labels.tolist()) == sorted(i % 3 for i in range(12))
    found = torch.cat([codes.trained.grids, codes.held_out.grids])
    assert all((found == one).all(dim=(1, 2)).any() for one in wanted) and len(found) == 12
    trainer.fit()
    one = LatentDataset(tmp_path / "codes", {"scaling_factor": 1.0})[5]
    assert torch.equal(one["codes"], wanted[5]) and one["label"] == 2
    refused = ["encode-dataset", "--model", "compact", "--data", str(tmp_path / "labelled.parquet"), "--size", "32",
               "--content", "codes", "-o", str(tmp_path / "none")]  # fmt: skip
    assert main(refused) == 2 and "compact has none; allowed: moments" in capsys.readouterr().err
