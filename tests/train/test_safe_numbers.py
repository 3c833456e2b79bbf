"""Steps with numbers that are not finite are skipped, counted and logged, and too many of them end the run."""

import json
import math

import pytest
import torch

from kl_autoencoder import DiagonalGaussian
from kl_autoencoder.networks.bottlenecks import kl as bottlenecks
from kl_autoencoder.networks.bottlenecks import posterior_summary
from tests.processes import finish, start_ranks
from tests.train.runs import make, records, small_config, weights
from tests.train.test_adversarial import all_parameters
from tests.train.test_restart import command, everything, train
from train.__main__ import main
from train.loop import trainer
from train.loop.trainer import TooManyBadSteps

ADVERSARIAL = {"weight": 0.5, "disc_start": 0, "channels": 4, "lecam_weight": 0.1, "r1_weight": 0.1}
LOSS = {"perceptual": {"weight": 0.0}, "adversarial": ADVERSARIAL}


def poisoned(loader, bad, value):
    """The batches of a loader, with one pixel of each sample in `bad` set to `value`."""
    for batch in loader:
        for row, n in enumerate(batch["sample"].tolist()):
            if n in bad:
                batch["images"][row, 1, 5, 7] = value
        yield batch


def state(run):
    """Copies of all that a step may move."""
    moments = [
        value
        for optimizer in (run.task.autoencoder.optimizer, run.task.adversary.player.optimizer)
        for entry in optimizer.state.values()
        for value in entry.values()
    ]
    everything = [
        *run.task.autoencoder.parameters,
        *run.task.adversary.player.parameters,
        *run.task.ema.network.parameters(),
        run.task.adversary.lecam_anchors,
        *moments,
    ]
    return [tensor.detach().clone() for tensor in everything]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_bad_step_moves_nothing(small, tmp_path, value, place):
    """One pixel of one image, in the first or the last micro-batch: neither network, moment nor anchor moves."""
    config = small(tmp_path, loss=LOSS, train={"steps": 6, "gradient_accumulation": 2})
    run = make(config)
    run.loader = poisoned(run.loader, {9 if place == "first" else 14}, value)  # both of step 1
    steps = run.batches()
    run.train_step(next(steps))
    # the average of weights that do not move does not move either
    run.task.ema.network.load_state_dict(run.task.vae.state_dict())
    before = state(run)
    # the moments are there
    assert len(before) > 3 * (
        len(run.task.autoencoder.parameters) + len(run.task.adversary.player.parameters)
    )
    run.train_step(next(steps))
    after = state(run)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert run.step == 2 and run.samples == 16
    run.train_step(next(steps))
    assert not torch.equal(state(run)[0], after[0])
    assert all(tensor.isfinite().all() for tensor in state(run))


def test_a_step_with_an_infinite_loss_and_a_finite_gradient_is_skipped(small, tmp_path):
    run = make(small(tmp_path, loss=LOSS))
    kl = bottlenecks.kl_per_dimension
    steps = run.batches()
    run.train_step(next(steps))
    before = [p.detach().clone() for p in run.task.autoencoder.parameters]
    bottlenecks.kl_per_dimension = lambda *given: kl(*given).detach() + math.inf
    try:
        run.train_step(next(steps))
    finally:
        bottlenecks.kl_per_dimension = kl
    assert all(torch.equal(p, was) for p, was in zip(run.task.autoencoder.parameters, before, strict=True))
    assert run.bad_steps.noted[-1][2]


def test_bad_steps_are_counted_logged_and_survive_a_restart(small, tmp_path, capsys):
    """Steps 2, 3 and 6 of 8; a checkpoint after step 3 and a report every fifth step."""
    loss = LOSS | {"reconstruction": "gaussian"}
    sections = {"loss": loss, "checkpoint": {"every": 3}, "log": {"every": 5}}
    config = small(tmp_path, train={"steps": 4}, **sections)
    run = make(config)
    bad = {5, 8, 9, 10, 22}
    run.loader = poisoned(run.loader, bad, math.nan)
    taken = run.batches()
    for _ in range(4):
        run.train_step(next(taken))
        if run.step == 3:
            run.save()
    again = make(small(tmp_path, train={"steps": 8}, **sections))  # as if killed after step 4
    assert again.step == 3
    again.loader = poisoned(again.loader, bad, math.nan)
    again.fit()
    assert records(tmp_path, "skipped_samples") == {2: [4, 5, 6, 7], 3: [8, 9, 10, 11], 6: [20, 21, 22, 23]}
    assert records(tmp_path, "train/skipped_steps") == {2: 1, 3: 2, 6: 3}
    assert "step 6 skipped: its gradient is not finite (samples 20 to 23)" in capsys.readouterr().out
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    # of the steps that were taken: a bad one does not hide the others
    means = records(tmp_path, "train/loss")
    assert set(means) == {5, 8} and all(0 < value < 10 for value in means.values())


def test_too_many_in_a_row_end_the_run_with_a_checkpoint(small, tmp_path):
    """Three bad steps, a good one, four bad ones, with at most four: stopped at the eighth."""
    sections = {"loss": LOSS, "checkpoint": {"every": 100}, "log": {"every": 100}}
    config = small(tmp_path, train={"steps": 20, "max_bad_steps": 4}, **sections)
    run = make(config)
    run.loader = poisoned(run.loader, set(range(12)) | set(range(16, 80)), math.inf)
    with pytest.raises(TooManyBadSteps, match=r"4 steps in a row .*train.max_bad_steps.*saved at step 8"):
        run.fit()
    assert len(records(tmp_path, "skipped_samples")) == 7
    saved = weights(tmp_path, 8)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    again = make(config)  # and it can go on from there
    assert again.step == 8
    again.fit()
    assert again.finished and not torch.equal(weights(tmp_path, 20)["vae.decoder.conv_in.weight"],
                                              saved["vae.decoder.conv_in.weight"])  # fmt: skip


def test_a_run_that_diverges_ends_in_one_line(photographs, tmp_path, capsys):
    """A learning rate of 100: a step overflows soon, and so do all that follow."""
    config = small_config(
        photographs, tmp_path, optimizer={"learning_rate": 100}, train={"steps": 50, "max_bad_steps": 3}
    )
    (tmp_path / "run.yaml").write_text(trainer.to_yaml(config))
    assert main([str(tmp_path / "run.yaml")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "3 steps in a row had gradients that are not finite" in errors[0]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())][-1] >= "step-000004"


def poison_one_rank(arguments, folder):
    """`python -m train` with a bad sample that rank 1 alone reads; each rank writes down what its steps did."""
    original, batches = trainer.Trainer.train_step, trainer.Trainer.batches

    def poisoned_batches(self):
        self.loader = poisoned(self.loader, {5}, math.nan)
        return batches(self)

    trainer.Trainer.batches = poisoned_batches

    def train_step(self, micro_batches):
        before = state(self)[0]
        original(self, micro_batches)
        moved = not torch.equal(before, state(self)[0])
        total = sum(p.double().sum().item() for p in all_parameters(self))
        rank = self.accelerator.process_index
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.step, rank, moved, total]) + "\n")

    trainer.Trainer.train_step = train_step
    return train(arguments)


def test_all_ranks_skip_the_same_step(photographs, tmp_path):
    config, log = everything(photographs, tmp_path / "run", steps=4), tmp_path / "log.txt"
    processes = start_ranks(2, log, poison_one_rank, command(config, tmp_path / "config.yaml"), tmp_path)
    assert finish(*processes) == [0, 0], log.read_text()
    lines = "".join((tmp_path / f"rank-{rank}.jsonl").read_text() for rank in range(2)).splitlines()
    moved = {(step, rank): (did, total) for step, rank, did, total in map(json.loads, lines)}
    assert len(moved) == 8
    for step in range(1, 5):
        assert moved[step, 0] == moved[step, 1], "the ranks' weights are not the same"
        assert moved[step, 0][0] == (step != 1)
    assert records(tmp_path / "run", "skipped_samples") == {1: list(range(8))}


# ------------------------------------------------------------------ what is visible


def test_a_collapsed_posterior_is_visible(small, tmp_path):
    """A KL weight of 100 presses every channel to the prior; one of 1e-6 leaves them all in use."""
    active, divergence = {}, {}
    for weight in (100, 1e-6):
        folder = tmp_path / str(weight)
        loss = {"perceptual": {"weight": 0.0}, "kl": {"weight": weight}}
        make(small(folder, loss=loss, train={"steps": 40}, log={"every": 10})).fit()
        active[weight] = records(folder, "train/latents/active_channels")[40]
        divergence[weight] = [records(folder, f"train/latents/kl_channel_{c}")[40] for c in range(2)]
        for name in ("mean", "std", "logvar"):
            assert all(math.isfinite(v) for v in records(folder, f"train/latents/{name}").values())
    assert active == {100: 0, 1e-6: 2}
    assert max(divergence[100]) < 0.01 < min(divergence[1e-6])


def test_the_summary_is_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 4, 3, 3, 3, generator=generator).unbind(0)
    mean[:, 2], logvar[:, 2] = 0, 0  # a channel at the prior
    summary = posterior_summary(DiagonalGaussian(torch.cat([mean, logvar], dim=1)))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    for c in range(3):
        torch.testing.assert_close(summary[f"latents/kl_channel_{c}"], kl[:, c].mean())
    torch.testing.assert_close(summary["latents/mean"], mean.mean())
    torch.testing.assert_close(summary["latents/std"], mean.std())
    torch.testing.assert_close(summary["latents/logvar"], logvar.mean())
    assert summary["latents/active_channels"] == 2


def test_a_profile_is_a_trace_and_a_table(small, tmp_path, capsys):
    make(small(tmp_path, loss=LOSS, train={"steps": 9, "profile": True})).fit()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {"data", "autoencoder", "discriminator", "optimizer"} <= set(named)
    assert named.count("data") == 5
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    rows = dict(line.rsplit(maxsplit=2)[:2] for line in table.splitlines()[1:])
    assert list(rows) == ["data", "autoencoder", "perceptual", "discriminator", "optimizer", "communication"]
    costs = {name: float(milliseconds) for name, milliseconds in rows.items()}
    assert min(costs["data"], costs["autoencoder"], costs["discriminator"], costs["optimizer"]) > 0
    assert costs["perceptual"] == costs["communication"] == 0
