"""A data-loader worker that fails or is killed ends all ranks, with one line, a checkpoint and no process left."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.processes import finish, start, start_ranks, wait_until
from tests.train.runs import records
from tests.train.test_restart import assert_same, command, everything, final, list_checkpoints, train
from train.autoencoder.task import AutoencoderTask

STEPS = 12


def disturbed(kind, folder, rank, step, arguments):
    """`python -m train` in which a rank calls FAULTS[kind] in the middle of a step."""
    original, moments = AutoencoderTask.micro_batch, [step]

    def micro_batch(self, step, batch):
        if step in moments and self.run.rank == rank:
            moments.pop()
            FAULTS[kind](folder)
        return original(self, step, batch)

    AutoencoderTask.micro_batch = micro_batch
    return train(arguments)


def delete_the_images(folder):
    shutil.rmtree(folder)


def kill_a_worker(folder):
    multiprocessing.active_children()[0].kill()


def fail_the_step(folder):
    raise RuntimeError("a step that fails")


def be_killed(folder):
    workers = [child.pid for child in multiprocessing.active_children()]
    (folder.parent / "workers").write_text(" ".join(map(str, workers)))
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {f.__name__: f for f in (delete_the_images, kill_a_worker, fail_the_step, be_killed)}


@pytest.fixture
def copy(photographs, tmp_path):
    return Path(shutil.copytree(photographs, tmp_path / "images"))


def config(copy, folder, **data):
    return everything(copy, folder, steps=STEPS, every=100, num_workers=1, **data)


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = command(config(photographs, folder / "run"), folder / "config.yaml")
    assert finish(start(folder / "log.txt", train, arguments)) == [0], (folder / "log.txt").read_text()
    return folder / "run"


MESSAGES = {
    "delete_the_images": r"error: data.train: none of",
    "kill_a_worker": r"error: data.num_workers: a worker ended",
}


@pytest.mark.parametrize("fault", MESSAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_of_the_loader_ends_all_ranks_after_a_whole_step(
    fault, ranks, photographs, copy, undisturbed, tmp_path
):
    log, run = tmp_path / "log.txt", tmp_path / "run"
    arguments = command(config(copy, run), tmp_path / "config.yaml")
    # The fault is on the last rank: the others hear of it.
    processes = start_ranks(ranks, log, disturbed, fault, copy, ranks - 1, 2, arguments)
    assert finish(*processes) == [1] * ranks, log.read_text()
    said = log.read_text()
    errors = [line for line in said.splitlines() if "error:" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith(MESSAGES[fault]) and len(errors[0]) < 300
    assert "Traceback" not in said
    [saved] = list_checkpoints(run)
    steps = int(saved.removeprefix("step-"))
    assert 3 <= steps < STEPS and max(records(run, "train/loss")) == steps
    shutil.copytree(photographs, copy, dirs_exist_ok=True)
    if ranks == 1:
        assert finish(start(log, train, arguments)) == [0], log.read_text()
        assert_same(final(run, STEPS), final(undisturbed, STEPS))


def test_a_step_that_fails_ends_the_process_though_its_workers_ignore_signals(copy, tmp_path):
    log, arguments = tmp_path / "log.txt", command(config(copy, tmp_path / "run"), tmp_path / "config.yaml")
    assert finish(start(log, disturbed, "fail_the_step", copy, 0, 2, arguments)) == [1], log.read_text()
    assert "a step that fails" in log.read_text()


def test_workers_end_with_a_trainer_that_is_killed(copy, tmp_path):
    log, arguments = tmp_path / "log.txt", command(config(copy, tmp_path / "run"), tmp_path / "config.yaml")
    process = start(log, disturbed, "be_killed", copy, 0, 2, arguments)
    assert finish(process) == [-signal.SIGKILL]
    [worker] = map(int, (tmp_path / "workers").read_text().split())
    gone = lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie"  # noqa: E731
    idle = start(log, wait_for_ever)
    try:
        assert wait_until(gone, idle)
    finally:
        idle.kill()


def wait_for_ever():
    signal.pause()
