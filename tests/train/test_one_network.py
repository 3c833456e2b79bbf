"""True of each task with one network: it resumes bit for bit, ranks equal one process, steps of NaN are skipped."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.processes import finish, start_ranks
from tests.train import test_code_prior, test_latent_diffusion
from tests.train.discrete import Brightness
from tests.train.test_family import last
from train.diffusion.task import LatentDiffusionTask
from train.loop.trainer import TooManyBadSteps, Trainer
from train.prior import task as prior_task

STEPS = 6


def code_prior(folder):
    """A source of images as it is, and the configuration of a run in `folder`/run."""
    source = folder / "images"
    if not source.exists():
        test_code_prior.write(source, test_code_prior.grids(24))
    return test_code_prior.config(
        source, folder / "run", train={"steps": STEPS, "gradient_accumulation": 2}, checkpoint={"every": 3}
    )


def make_code_prior(config):
    prior_task.load_model = lambda name, device, dtype: Brightness()
    return Trainer(config, prior_task.CodePriorTask)


def latent_diffusion(folder):
    latents = folder / "latents"
    if not latents.exists():
        test_latent_diffusion.encoded(folder, 12, "moments")
    return test_latent_diffusion.config(
        latents,
        folder / "run",
        loss={"label_dropout": 0.5},
        train={"steps": STEPS, "gradient_accumulation": 2},
        checkpoint={"every": 3},
    )


def make_latent_diffusion(config):
    return Trainer(config, LatentDiffusionTask)


TASKS = {
    "code_prior": (code_prior, make_code_prior),
    "latent_diffusion": (latent_diffusion, make_latent_diffusion),
}


@pytest.fixture(params=TASKS)
def kind(request, monkeypatch):
    monkeypatch.setattr(prior_task, "load_model", prior_task.load_model)  # put back afterwards
    return request.param


def made(kind, config):
    AcceleratorState._reset_state(reset_partial_state=True)
    return TASKS[kind][1](config)


def test_a_run_that_continues_has_the_same_bits(kind, tmp_path):
    config = TASKS[kind][0](tmp_path)
    made(kind, config).fit()
    name = "checkpoints/step-000003"
    shutil.copytree(tmp_path / "run" / name, tmp_path / "again" / name)
    continued = made(kind, replace(config, output_dir=str(tmp_path / "again")))
    assert continued.step == 3
    continued.fit()
    whole, again = (last(tmp_path / run, STEPS) for run in ("run", "again"))
    assert {name.split("/")[0] for name in whole} == {"model", "ema", "optimizer"}
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def fit_of_a_rank(kind, folder, batch_size):
    config = TASKS[kind][0](folder)
    TASKS[kind][1](replace(config, data=replace(config.data, batch_size=batch_size))).fit()


def test_two_ranks_are_one_process(kind, tmp_path):
    TASKS[kind][0](tmp_path)
    found = {}
    for ranks, batch_size in ((1, 4), (2, 2)):
        log = tmp_path / f"log-{ranks}.txt"
        exits = finish(*start_ranks(ranks, log, fit_of_a_rank, kind, tmp_path, batch_size))
        assert exits == [0] * ranks, log.read_text()
        found[ranks] = last(tmp_path / "run", STEPS)
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        found[ranks] |= {"last": torch.tensor([float(v) for v in numbers_of(metrics[-1])])}
        shutil.rmtree(tmp_path / "run")
    assert found[1].keys() == found[2].keys() and len(found[1]["last"]) > 0
    for key, value in found[1].items():
        torch.testing.assert_close(found[2][key].double(), value.double(), rtol=2e-4, atol=2e-5)


def numbers_of(line):
    return [value for key, value in json.loads(line).items() if key.startswith("validation/")]


def test_a_step_of_nan_is_skipped(kind, tmp_path):
    config = TASKS[kind][0](tmp_path)
    trainer = made(kind, replace(config, train=replace(config.train, steps=9, max_bad_steps=3)))
    before = {name: tensor.clone() for name, tensor in trainer.task.network.state_dict().items()}
    move = trainer.task.move
    trainer.task.move = lambda loss: move(loss * torch.nan)
    with pytest.raises(TooManyBadSteps, match="3 steps in a row"):
        trainer.fit()
    assert all(
        torch.equal(before[name], tensor) for name, tensor in trainer.task.network.state_dict().items()
    )
