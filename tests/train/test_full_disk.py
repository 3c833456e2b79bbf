"""A full disk costs a run no more than what could not be written: it warns, trains on, and tries again.

On a tmpfs of 64 MB where these tests may mount one, and everywhere with the kernel's limit on the size of a file,
which checkpoints and TensorBoard's files reach.
"""

import json
import os
import resource
import subprocess

import pytest
from accelerate import Accelerator
from PIL import Image

from kl_autoencoder import KLAutoencoder
from tests.processes import finish, start, start_ranks
from tests.train.test_checkpoint import names, refuse_large_files
from tests.train.test_restart import assert_same, command, everything, final, list_checkpoints, train
from train.loop import trainer
from train.loop.checkpoints.files import damage
from train.loop.journal import Journal

STEPS = 6


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request, tmp_path):
    """A folder, and whether it is a disk of its own, which a large file fills."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        yield folder, False
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder, True
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = command(everything(photographs, folder / "run", STEPS), folder / "config.yaml")
    assert finish(start(folder / "log.txt", train, arguments)) == [0], (folder / "log.txt").read_text()
    return folder / "run"


def run_on(disk, is_full, arguments):
    """`python -m train` on a disk that is full in the steps for which `is_full`, from their middle on."""
    folder, real = disk
    original, ballast = trainer.Trainer.train_step, folder / "ballast"

    def train_step(self, micro_batches):
        original(self, micro_batches)
        if not self.is_main:
            return
        if not real:
            refuse_large_files(100_000 if self.step in is_full else resource.RLIM_INFINITY)
        elif self.step in is_full:
            fill(ballast)
        else:
            ballast.unlink(missing_ok=True)

    trainer.Trainer.train_step = train_step
    return train(arguments)


def fill(ballast):
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                pass


def config_on(disk, photographs, **more):
    config = everything(photographs, disk[0] / "run", STEPS, **more)
    object.__setattr__(config, "log", type(config.log)(every=1, tensorboard=True))
    object.__setattr__(config, "validation", type(config.validation)(every=1, lpips_net="squeeze"))
    return config


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_a_full_disk_trains_on_and_writes_again_when_there_is_room(
    disk, ranks, photographs, undisturbed, tmp_path
):
    """Full in steps 3 and 4: two checkpoints, pictures and lines are missing; in the end only the pictures."""
    more = {} if ranks == 1 else {"batch_size": 1}  # the same batch over both
    arguments = command(config_on(disk, photographs, **more), tmp_path / "config.yaml")
    log, run = tmp_path / "log.txt", disk[0] / "run"
    assert finish(*start_ranks(ranks, log, run_on, disk, (3, 4), arguments)) == [0] * ranks, log.read_text()
    said = log.read_text()
    for step in (3, 4):
        assert f"step-{step:06d}: the checkpoint could not be written" in said
    assert said.count("training goes on, and the next save tries again") == 2
    assert said.count("metrics.jsonl: cannot be written") <= 1  # not at every step; its page may have room
    assert "Traceback" not in said and "\nerror:" not in said
    assert list_checkpoints(run) == ["step-000005", "step-000006"]
    assert all(damage(run / "checkpoints" / name) is None for name in list_checkpoints(run))
    assert not list(run.rglob(".*.tmp")) + list(run.rglob(".*.writing"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    pictures = {path.name for path in (run / "samples").iterdir()}
    assert pictures == {f"step-{step:06d}.png" for step in range(7) if not (disk[1] and step in (3, 4))}
    for name in pictures:
        Image.open(run / "samples" / name).load()
    assert KLAutoencoder.from_pretrained(run / "export").config.latent_channels == 2
    if ranks == 1:  # two round otherwise
        assert_same(final(run, STEPS), final(undisturbed, STEPS))


def test_if_the_last_checkpoint_fails_the_run_ends_and_the_same_command_goes_on(
    disk, photographs, undisturbed, tmp_path
):
    arguments = command(config_on(disk, photographs), tmp_path / "config.yaml")
    log, run = tmp_path / "log.txt", disk[0] / "run"
    assert finish(start(log, run_on, disk, range(3, 99), arguments)) == [1]
    said = log.read_text()
    assert "step-000006: the checkpoint could not be written" in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert names(run / "checkpoints") == ["step-000001", "step-000002"]
    assert not (run / "export").exists()
    if disk[1]:  # still full
        before = log.read_text()
        assert finish(start(log, train, arguments)) == [2]
        [error] = [line for line in log.read_text()[len(before) :].splitlines() if "error: " in line]
        assert "No space left on device" in error and names(run / "checkpoints") == [
            "step-000001",
            "step-000002",
        ]
        (disk[0] / "ballast").unlink()
    assert finish(start(log, train, arguments)) == [0], log.read_text()
    assert_same(final(run, STEPS), final(undisturbed, STEPS))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_lines_that_cannot_be_written_wait_for_room(tmp_path):
    """In their order, each whole; the file is named once."""
    said, path = [], tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(tmp_path, Accelerator(), trackers=(), say=said.append)
    for step in (1, 2):
        journal.write(step, 8 * step, {"train/loss": 0.5})
    assert said == [f"WARNING: {path}: cannot be written (No space left on device); training goes on"]
    path.unlink()
    journal.write(3, 24, {"train/loss": float("nan")})
    assert [(line["step"], line["train/loss"]) for line in journal.lines()] == [(1, 0.5), (2, 0.5), (3, None)]
