"""Parts by kind: a bottleneck, a view and a term of a user's own module, and the noise on latents."""

import json
import re
import sys
from functools import partial

import pytest
import torch

from tests.conftest import ROOT
from train.autoencoder.task import AutoencoderTask
from train.config import load_config, to_yaml
from train.loop.trainer import Trainer
from train.parts import VIEWS, Draws

TOY = """
from typing import Literal
import torch
from torch import nn
from kl_autoencoder.networks.bottlenecks import Bottleneck, Code
from train.parts import BOTTLENECKS, TERMS, VIEWS, Term
from train.settings import choice, key, section

@section
class PlainConfig:
    kind: Literal["plain"] = choice("plain", "the mean, and a gain that is learned")
    weight: float = key(0.5, "of the latents' square", low=0)

class Plain(Bottleneck):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.gain = weight, nn.Parameter(torch.ones(()))
    def noise_shape(self, latent):
        return ()
    def forward(self, moments, noise, dimensions):
        z = self.gain * moments.chunk(2, dim=1)[0]
        square = self.weight * z.square().sum(dim=(1, 2, 3)) / dimensions
        return Code(z, {"square": square}, lambda: {"latents/gain": self.gain.detach()})

@BOTTLENECKS.register(PlainConfig)
def plain(config, run):
    return Plain(config.weight)

@section
class FlipConfig:
    kind: Literal["flip"] = choice("flip", "latents and images upside down")

@VIEWS.register(FlipConfig)
def flip(config, run):
    return lambda z, images, draws: (z.flip(2), images.flip(2))

@section
class TermConfig:
    kind: Literal["toy"] = choice("toy", "a toy")
    weight: float = key(1.0, "of it", low=0)
    at: Literal["pixels", "latents"] = choice("pixels", "where")

@TERMS.register(TermConfig)
def brightness(config, run):
    def compute(made, images):
        return (made.mean() - 1).square()
    return Term("toy_" + config.at, config.at, lambda step: config.weight if step else 0.0, compute)
"""
RUN = """
output_dir: {folder}
plugins: [toy_parts]
model: {{block_out_channels: [8, 16], layers_per_block: 1, norm_num_groups: 4{model}}}
data: {{train: sample-photographs, validation: sample-photographs, validation_resolution: 32, validation_images: 2,
       resolution: 32, batch_size: 2, num_workers: 0}}
loss: {{perceptual: {{weight: 0}}{loss}}}
train: {{steps: 2}}
validation: {{every: 0}}
log: {{every: 1, tensorboard: false}}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Writes the module outside of the repository; gives a function from YAML parts to the last step's metrics."""
    (tmp_path / "toy_parts.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name, model="", loss=""):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RUN.format(folder=tmp_path / name, model=model, loss=loss))
        config = load_config(path)
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config))
        assert load_config(again) == config
        trainer = Trainer(config, partial(AutoencoderTask, statistics_samples=2))
        trainer.fit()
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return trainer, [line for line in lines if "train/loss" in line][-1]

    yield run
    sys.modules.pop("toy_parts", None)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.task.vae.parameters()])


@pytest.mark.parametrize("at", ["pixels", "latents"])
def test_a_term_from_elsewhere_joins_the_objective(toy, at):
    without, plain = toy("without")
    trainer, line = toy("with", loss=f", terms: [{{kind: toy, weight: 3, at: {at}}}]")
    value = line[f"train/toy_{at}"]
    assert value > 0 and line["train/loss"] == pytest.approx(plain["train/loss"] + 3 * value, rel=1e-5)
    assert not torch.equal(weights(trainer), weights(without))


def test_a_bottleneck_from_elsewhere_is_trained(toy):
    trainer, line = toy("run", model=", bottleneck: {kind: plain, weight: 0.25}")
    assert line["train/square"] > 0 and "train/kl" not in line
    assert line["train/latents/gain"] == pytest.approx(trainer.task.model.bottleneck.gain.item())
    assert line["train/latents/gain"] != 1
    assert line["train/loss"] == pytest.approx(line["train/reconstruction"] + line["train/square"], rel=1e-6)


def test_a_view_from_elsewhere_turns_latents_and_targets(toy):
    trainer, _ = toy("run", loss=", view: {kind: flip}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.zeros(2, 4, 16, 16)
    turned = trainer.task.model(images, noise)
    trainer.task.model.view = lambda z, images, draws: (z, images)
    plain = trainer.task.model(images, noise)
    assert torch.equal(turned.targets, images.flip(2)) and torch.equal(plain.targets, images)
    assert not torch.equal(turned.images, plain.images)


def test_parts_that_do_not_exist_are_named(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("output_dir: a\ndata: {train: b}\n")
    for override, message in (
        (
            "loss.view={kind: nose}",
            r"loss.view.kind: 'nose'; allowed: equivariance, identity, noise.*did you mean noise",
        ),
        ("loss.view={kind: noise, hihg: 1}", r"loss.view.hihg: no such key; did you mean loss.view.high\?"),
        ("loss.view={kind: noise, low: 2, high: 1}", r"loss.view.low: 2.0; allowed: at most loss.view.high"),
        ("loss.view=noise", r"loss.view.kind: 'noise'"),
        ("loss.terms={}", r"loss.terms: {}; allowed: a list"),
        ("loss.terms=[{kind: x}]", r"loss.terms\[0\].kind: 'x'; allowed"),
        ("model.bottleneck={kind: kl, a: 1}", r"model.bottleneck.a: no such key"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, [override])


def test_noise_has_the_deviations_that_are_asked_for_and_follows_the_sample():
    numbers, z = torch.arange(64), torch.zeros(64, 4, 32, 32)
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", ["loss.view={kind: noise, low: 0.2, high: 0.8}"]
    )
    view = VIEWS.build(config.loss.view, config)
    noisy, images = view(z, z, Draws(0, numbers, z.device))
    deviations = noisy.flatten(1).std(dim=1)
    assert images is z and 0.19 < deviations.min() < 0.25 and 0.75 < deviations.max() < 0.82
    assert deviations.mean().item() == pytest.approx(0.5, abs=0.06)
    half = view(z[32:], z[32:], Draws(0, numbers[32:], z.device))[0]
    assert torch.equal(half, noisy[32:])  # whichever batch, rank or restart a sample comes in
    assert not torch.equal(view(z, z, Draws(1, numbers, z.device))[0], noisy)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "train" / "parts" / "README.md").read_text()
    (tmp_path / "brightness.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "a.yaml"
    path.write_text(RUN.format(folder=tmp_path / "run", model="", loss=", terms: [{kind: brightness, weight: 0.1}]")
                    .replace("toy_parts", "brightness"))  # fmt: skip
    trainer = Trainer(load_config(path), partial(AutoencoderTask, statistics_samples=2))
    [term] = trainer.task.objective.terms
    assert term.compute(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)) == 1 and term.weight(7) == 0.1
    trainer.accelerator.end_training()
    sys.modules.pop("brightness", None)
