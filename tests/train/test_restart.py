"""Stop anywhere, run the same command again, end with the same weights."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.processes import PATIENCE, finish, start, start_ranks, wait_until
from tests.train.runs import make, records, small_config, write_odd_images
from train.__main__ import INTERRUPTED, STOPPED, main
from train.autoencoder import task
from train.autoencoder.task import AutoencoderTask
from train.config import to_yaml
from train.loop import launch, trainer
from train.loop.launch import lock_folder

STEPS = 8
KILLS = 20
# Two micro-batches a step; the discriminator from step 2, felt from step 3, fully from step 5; R1 every other step.
EVERYTHING = {
    "loss": {
        "reconstruction": "gaussian",
        "perceptual": {"weight": 0.0},
        "view": {"kind": "equivariance", "smallest_side": 24},
        "adversarial": {
            "weight": 0.5, "disc_start": 2, "disc_warmup_steps": 1, "ramp_steps": 2, "channels": 4,
            "lecam_weight": 0.1, "r1_weight": 0.1, "r1_every": 2,
        },
    },
    "data": {"batch_size": 2},
    "optimizer": {"schedule": "cosine"},
}  # fmt: skip
FILES = {"model", "ema", "discriminator", "optimizer", "discriminator_optimizer", "lecam"}


def everything(photographs, folder, steps=STEPS, every=1, keep_last=2, **data):
    """The configuration of a run with EVERYTHING; `every` and `keep_last` are of its checkpoints."""
    return small_config(
        photographs,
        folder,
        **EVERYTHING | {"data": EVERYTHING["data"] | data},
        train={"steps": steps, "gradient_accumulation": 2},
        checkpoint={"every": every, "keep_last": keep_last},
    )


def command(config, path):
    """The arguments of `python -m train` for a configuration."""
    path.write_text(to_yaml(config))
    return [str(path)]


def train(arguments):
    """`python -m train`, but with a few crops to measure the scaling factor from."""
    task.STATISTICS_SAMPLES = 4
    return main(arguments)


def final(folder, steps=STEPS):
    """All tensors of the last checkpoint, by file."""
    files = (folder / "checkpoints" / f"step-{steps:06d}").glob("*.safetensors")
    return {file.stem: load_file(file) for file in files}


def assert_same(a, b):
    assert a.keys() == b.keys() == FILES
    for name in a:
        assert a[name].keys() == b[name].keys()
        different = [key for key in a[name] if not torch.equal(a[name][key], b[name][key])]
        assert not different, f"{name}: {len(different)} of {len(a[name])} tensors, {different[:3]}"


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    """A run without interruption, in a process of its own; all of its checkpoints are kept."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = command(everything(photographs, folder / "run", keep_last=STEPS), folder / "config.yaml")
    assert finish(start(folder / "log.txt", train, arguments)) == [0], (folder / "log.txt").read_text()
    return folder / "run"


def test_every_step_continues_to_the_same_weights(photographs, undisturbed, tmp_path):
    """Resume before the discriminator starts, before and after it is felt, and after steps with and without R1.

    Each resumes in a process of its own, as the undisturbed run had one: in a process that has run other tests a
    convolution may round differently.
    """
    log = tmp_path / "log.txt"
    for step in range(1, STEPS):
        folder, name = tmp_path / str(step), f"checkpoints/step-{step:06d}"
        shutil.copytree(undisturbed / name, folder / name)
        arguments = command(everything(photographs, folder), tmp_path / "config.yaml")
        assert finish(start(log, train, arguments)) == [0], log.read_text()
        assert_same(final(folder), final(undisturbed))


@pytest.mark.parametrize("workers", [0, 1])
def test_twenty_kills_change_nothing(photographs, tmp_path, workers):
    """SIGKILL while the run starts, in its steps, and while it writes a checkpoint; three kills with a worker.

    A run that ends before it is killed is compared with the whole one, and the next starts afresh.
    """
    kills, steps = (3, 6) if workers else (KILLS, 30)
    rng, log = random.Random(kills), tmp_path / "log.txt"
    config = partial(everything, photographs, steps=steps, every=2, num_workers=workers)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert finish(start(log, train, command(config(whole), tmp_path / "whole.yaml"))) == [0]
    arguments = command(config(folder), tmp_path / "run.yaml")
    counts = {"starting": 0, "stepping": 0, "writing": 0}
    while sum(counts.values()) < kills:
        kind = list(counts)[sum(counts.values()) % 3]
        process = start(log, train, arguments)
        MOMENTS[kind](process, folder, rng)
        process.kill()
        [code] = finish(process)
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:
            assert_same(final(folder, steps), final(whole, steps))
            shutil.rmtree(folder)
        elif kind != "writing" or half_written(folder):
            counts[kind] += 1
    assert finish(start(log, train, arguments)) == [0], log.read_text()
    assert_same(final(folder, steps), final(whole, steps))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in (steps - 2, steps)
    }
    for key in ("train/loss", "train/discriminator/loss", "samples"):
        assert records(folder, key) == records(whole, key)
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)


def while_starting(process, folder, rng):
    """Wait for a time that may end anywhere from the first instruction to the first checkpoint."""
    until, saved = time.monotonic() + rng.uniform(0, 0.8), len(list_checkpoints(folder))
    wait_until(lambda: time.monotonic() > until or len(list_checkpoints(folder)) > saved, process)


def while_stepping(process, folder, rng):
    """Wait for the next checkpoint, then for a part of the steps after it."""
    saved = list_checkpoints(folder)
    wait_until(lambda: list_checkpoints(folder) not in (saved, []), process)
    time.sleep(rng.uniform(0, 0.15))


def while_writing(process, folder, rng):
    """Wait until the next checkpoint, or the one after it, is being written.

    What an earlier kill has left half written is cleared away first.
    """
    for _ in range(rng.choice((1, 2))):
        wait_until(lambda: not half_written(folder), process)
        wait_until(lambda: half_written(folder), process)
    time.sleep(rng.uniform(0, 0.01))


MOMENTS = {"starting": while_starting, "stepping": while_stepping, "writing": while_writing}


def list_checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def half_written(folder):
    return any((folder / "checkpoints").glob(".step-*.writing"))


# ------------------------------------------------------------------ being asked to stop


def signalled(number, times, step, rank, arguments):
    """`python -m train` in which `rank` sends itself signal `number`, `times` times, in the middle of `step`."""
    original, moments = AutoencoderTask.micro_batch, [step] * times
    launch.ASK_EVERY = 0.0  # after each step

    def micro_batch(self, step, batch):
        if step in moments and self.run.rank == rank:
            moments.pop()
            os.kill(os.getpid(), number)
        return original(self, step, batch)

    AutoencoderTask.micro_batch = micro_batch
    return train(arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(photographs, undisturbed, tmp_path, number):
    config = everything(photographs, tmp_path / "run", every=100)
    config = replace(config, log=replace(config.log, tensorboard=True))
    arguments, log = command(config, tmp_path / "config.yaml"), tmp_path / "log.txt"
    assert finish(start(log, signalled, number, 1, 3, 0, arguments)) == [STOPPED]
    [events] = (tmp_path / "run" / "logs").rglob("events.out.tfevents*")
    # flushed, though TensorBoard writes every two minutes
    assert events.read_bytes().count(b"train/loss") == 4
    said = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert f"{said} at step 4; the same command continues from there" in log.read_text()
    assert list_checkpoints(tmp_path / "run") == ["step-000004"]
    assert set(records(tmp_path / "run", "train/loss")) == {1, 2, 3, 4}
    assert not (tmp_path / "run" / "export").exists()
    assert finish(start(log, train, arguments)) == [0], log.read_text()
    assert_same(final(tmp_path / "run"), final(undisturbed))


def interrupted_outside_of_the_steps(method, arguments):
    """`python -m train` with Ctrl-C when it opens the data, or when it measures the latents for the export."""
    owner = task.TrainingData if method == "held_out" else AutoencoderTask
    original = getattr(owner, method)

    def wrapped(self, *more):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *more)

    setattr(owner, method, wrapped)
    return train(arguments)


@pytest.mark.parametrize("method", ["held_out", "measure_latents"])
def test_ctrl_c_before_the_first_step_and_after_the_last_is_one_line(photographs, tmp_path, method):
    arguments = command(everything(photographs, tmp_path / "run", steps=4), tmp_path / "config.yaml")
    log = tmp_path / "log.txt"
    assert finish(start(log, interrupted_outside_of_the_steps, method, arguments)) == [INTERRUPTED]
    assert "\ninterrupted; the same command continues" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert finish(start(log, train, arguments)) == [0], log.read_text()
    said = "all 4 steps (train.steps) were taken before; measuring and exporting again"
    assert (said in log.read_text()) == (method == "measure_latents")


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "interrupted_here.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["configs/quickstart.yaml", "plugins=[interrupted_here]"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command continues\n"


def test_a_signal_to_one_rank_stops_both_at_the_same_step(photographs, tmp_path):
    arguments = command(everything(photographs, tmp_path / "run", every=100), tmp_path / "config.yaml")
    log = tmp_path / "log.txt"
    processes = start_ranks(2, log, signalled, signal.SIGTERM, 1, 3, 1, arguments)
    assert finish(*processes) == [STOPPED, STOPPED], log.read_text()
    assert list_checkpoints(tmp_path / "run") == ["step-000004"]


def ask_for_stops(folder):
    """Up to forty steps of 0.1 s on the first rank and 0.2 s on the second; a signal to the first in step 8.

    Each rank writes down the step at which it stopped, and the steps in which the ranks asked each other.
    """
    accelerator, rank, clock = Accelerator(cpu=True), int(os.environ["RANK"]), [0.0]
    launch.time = SimpleNamespace(monotonic=lambda: clock[0])
    asked, agree = [], launch.StopRequest._agree
    launch.StopRequest._agree = lambda self, step: asked.append(step) or agree(self, step)
    with launch.StopRequest(accelerator) as stop:
        for step in range(1, 41):
            clock[0] += 0.1 * (1 + rank)
            if (step, rank) == (8, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.requested(step):
                break
    (folder / str(rank)).write_text(json.dumps([step, asked]))


def test_ranks_ask_each_other_once_a_second_of_the_slowest_and_stop_at_the_same_step(tmp_path):
    log = tmp_path / "log.txt"
    assert finish(*start_ranks(2, log, ask_for_stops, tmp_path)) == [0, 0], log.read_text()
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second == [11, [1, 6, 11]]


def test_a_signal_that_a_launcher_passes_on_does_not_count_as_a_second_one(photographs, tmp_path):
    """Ctrl-C and SLURM signal every process of a job, and torchrun then signals its ranks once more."""
    arguments = command(everything(photographs, tmp_path / "run", every=100), tmp_path / "config.yaml")
    log = tmp_path / "log.txt"
    assert finish(*start_ranks(1, log, signalled, signal.SIGTERM, 2, 3, 0, arguments)) == [STOPPED]
    assert list_checkpoints(tmp_path / "run") == ["step-000004"]


def test_a_second_signal_ends_at_once(photographs, tmp_path):
    arguments = command(everything(photographs, tmp_path / "run"), tmp_path / "config.yaml")
    process = start(tmp_path / "log.txt", signalled, signal.SIGTERM, 2, 3, 0, arguments)
    assert finish(process) == [-signal.SIGTERM]
    assert list_checkpoints(tmp_path / "run")[-1] == "step-000003"


# ------------------------------------------------------------------ launchers, and two runs at once


def test_two_ranks_whose_launcher_is_killed_go_on_when_it_is_run_again(photographs, tmp_path):
    """Only `accelerate launch` gets a SIGKILL: its ranks stop by themselves, and two new ones continue."""
    config = partial(everything, photographs, steps=16)
    log, arguments = tmp_path / "log.txt", command(config(tmp_path / "run"), tmp_path / "run.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    with log.open("ab") as output:
        first = subprocess.Popen(
            [*launcher, "-m", "train", *arguments], cwd=ROOT, stdout=output, stderr=output
        )
        wait_until(lambda: list_checkpoints(tmp_path / "run"), first)
        first.kill()
        assert first.wait() == -signal.SIGKILL
    assert finish(*start_ranks(2, log, train, arguments)) == [0, 0], log.read_text()
    assert "stopped by SIGTERM at step" in log.read_text()
    assert "continuing from" in log.read_text()
    whole = command(config(tmp_path / "whole"), tmp_path / "whole.yaml")
    assert finish(*start_ranks(2, log, train, whole)) == [0, 0]
    assert_same(final(tmp_path / "run", 16), final(tmp_path / "whole", 16))


def keep(folder):
    """Hold the lock of an output folder until the process is killed."""
    lock = lock_folder(folder, print)
    (folder / "held").touch()
    time.sleep(PATIENCE)
    lock.close()


def test_an_output_folder_belongs_to_one_run_at_a_time(tmp_path):
    process, said = start(tmp_path / "log.txt", keep, tmp_path), []
    wait_until((tmp_path / "held").exists, process)
    with pytest.raises(ValueError, match=f"output_dir: another run is writing to {tmp_path}; allowed: "):
        lock_folder(tmp_path, said.append, patience=0.3)
    assert len(said) == 1 and "waiting" in said[0]
    process.kill()
    lock_folder(tmp_path, said.append)


# ------------------------------------------------------------------ other numbers of ranks


def recorded(arguments, folder, life):
    """`python -m train` that writes down the samples that each step consumes, with a hash of their pixels."""
    original = trainer.Trainer.train_step

    def train_step(self, micro_batches):
        with (folder / f"{life}-{self.accelerator.process_index}.jsonl").open("a") as file:
            for batch in micro_batches:
                for n, image in zip(batch["sample"].tolist(), batch["images"], strict=True):
                    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                    file.write(json.dumps([self.step, n, digest]) + "\n")
        original(self, micro_batches)

    trainer.Trainer.train_step = train_step
    return train(arguments)


def test_any_number_of_ranks_consumes_the_same_samples_in_the_same_order(photographs, tmp_path):
    """Two ranks to step 4, one to step 6, four with two workers each to step 8, against one process alone."""
    log, consumed, steps = tmp_path / "log.txt", {}, 0
    for ranks, until, workers in ((2, 4, 0), (1, 6, 0), (4, 8, 2)):
        config = everything(photographs, tmp_path / "run", steps=until, num_workers=workers)
        arguments = command(config, tmp_path / "config.yaml")
        processes = start_ranks(ranks, log, recorded, arguments, tmp_path, ranks)
        assert finish(*processes) == [0] * ranks, log.read_text()
        lines = [
            json.loads(line)
            for file in tmp_path.glob(f"{ranks}-*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for step in range(steps, until):
            taken = {n: digest for at, n, digest in lines if at == step}
            assert sorted(taken) == list(range(len(consumed), len(consumed) + ranks * 2 * 2))
            consumed |= taken
        steps = until
    alone = everything(photographs, tmp_path / "alone", steps=len(consumed) // 4)
    loader = iter(make(alone).loader)
    for _ in range(len(consumed) // 2):
        batch = next(loader)
        for n, image in zip(batch["sample"].tolist(), batch["images"], strict=True):
            assert consumed.pop(n) == hashlib.sha256(image.numpy().tobytes()).hexdigest()
    assert not consumed
    assert "  ranks: 1 -> 4, 16 samples a step" in log.read_text()


def test_images_skipped_on_other_ranks_and_before_a_restart_are_in_the_summary(tmp_path):
    """Two ranks read a whole epoch with every damaged file; the one process that continues meets few of them."""
    damaged, log = write_odd_images(tmp_path / "odd"), tmp_path / "log.txt"
    for ranks, steps in ((2, 3), (1, 4)):
        config = small_config(
            tmp_path / "odd", tmp_path / "run", data={"batch_size": 8}, train={"steps": steps}
        )
        config = replace(config, data=replace(config.data, validation=str(tmp_path / "odd")))
        arguments = command(config, tmp_path / "config.yaml")
        log.unlink(missing_ok=True)
        assert finish(*start_ranks(ranks, log, train, arguments)) == [0] * ranks, log.read_text()
        said = log.read_text()
        head = "8 images were skipped (4 too small, 4 unreadable):"  # the damaged, and four of one pixel
        assert said.count(head) == 1
        assert all(f"odd/{name} (row" in said[said.index(head) :] for name in damaged)


# ------------------------------------------------------------------ damage


def test_a_run_that_has_lost_its_metrics_file_still_finishes(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(task, "STATISTICS_SAMPLES", 4)
    path = tmp_path / "config.yaml"
    assert main(command(small_config(photographs, tmp_path / "run", train={"steps": 1}), path)) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(command(small_config(photographs, tmp_path / "run", train={"steps": 2}), path)) == 0
    assert "| before training | not recorded | | |" in (tmp_path / "run" / "export" / "README.md").read_text()
    assert "after training" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on(photographs, undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    for step in (4, 5):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(undisturbed / name, folder / name)
    model = folder / "checkpoints" / "step-000005" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    arguments = command(everything(photographs, folder, keep_last=9), tmp_path / "config.yaml")
    assert finish(start(log, train, arguments)) == [0], log.read_text()
    said = log.read_text()
    assert "step-000005: model.safetensors is not what was written" in said
    assert "set aside as step-000005.damaged" in said and "continuing from" in said
    assert list_checkpoints(folder) == [*(f"step-{n:06d}" for n in (4, 5)), "step-000005.damaged",
                                        *(f"step-{n:06d}" for n in (6, 7, 8))]  # fmt: skip
    assert_same(final(folder), final(undisturbed))
