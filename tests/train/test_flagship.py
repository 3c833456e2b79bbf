"""kl_f8.yaml shrunk, compiled, with its adversarial term and adaptive weight, on two ranks: kills change nothing.

The suite traces one level as inductor does and lets torch's own kernels run what was traced (aot_eager), with one
kill. All four levels by inductor, which compiles C++ for minutes on a CPU: `python -m tests.benchmarks.flagship`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.conftest import ROOT
from tests.file_server import FileServer, write_tar
from tests.processes import finish, start_ranks, wait_until
from tests.train.runs import records
from tests.train.test_family import last
from train.autoencoder.task import AutoencoderTask
from train.config import load_config
from train.loop import trainer
from train.smoke import shrink

STEPS, DISC_START = 9, 5


def fit(folder: Path, backend: str, data: dict) -> None:
    """A rank of the run: all of the network for inductor, one level of it otherwise. `data`: keys of DataConfig."""
    torch.compile = partial(torch.compile, backend=backend)
    small = shrink(load_config(ROOT / "configs" / "kl_f8.yaml"), folder)
    adversarial = replace(small.loss.adversarial, disc_start=DISC_START)
    model, perceptual = small.model, small.loss.perceptual
    if backend != "inductor":
        model = replace(model, block_out_channels=model.block_out_channels[:1], layers_per_block=1)
        perceptual = replace(perceptual, weight=0.0)
        adversarial = replace(adversarial, layers=1)
    small = replace(
        small,
        model=model,
        data=replace(small.data, validation="sample-photographs", **data),
        loss=replace(small.loss, adversarial=adversarial, perceptual=perceptual),
        train=replace(small.train, steps=STEPS, compile=True),
        validation=replace(small.validation, every=0),
        checkpoint=replace(small.checkpoint, every=2),
    )
    trainer.Trainer(small, partial(AutoencoderTask, statistics_samples=4)).fit()


@contextmanager
def folder_of_photographs(photographs: Path, scratch: Path) -> Iterator[dict]:
    yield {"train": str(photographs)}


@contextmanager
def shards_over_http(photographs: Path, scratch: Path) -> Iterator[dict]:
    """Four tar shards of twelve photographs each, streamed from a local server."""
    files, shards = sorted(photographs.glob("*.png")), scratch / "shards"
    shards.mkdir()
    for number in range(4):
        entries = [(file.name, file.read_bytes()) for file in files[number::4]]
        write_tar(shards / f"shard-{number:03d}.tar", entries)
    with FileServer(shards) as server:
        yield {"train": f"{server.url}/shard-{{000..003}}.tar", "image_column": "png", "streaming": True}


SOURCES = [folder_of_photographs, shards_over_http]


def compare(source: Callable, photographs: Path, scratch: Path, backend: str, kills: tuple[int, ...]) -> None:
    """Compare an undisturbed run with one whose ranks are killed after saving each of the steps in `kills`."""
    log, whole, killed = scratch / "log.txt", scratch / "whole", scratch / "killed"
    with source(photographs, scratch) as data:
        assert finish(*start_ranks(2, log, fit, whole, backend, data)) == [0, 0], log.read_text()
        for step in kills:
            processes = start_ranks(2, log, fit, killed, backend, data)
            saved = killed / "checkpoints" / f"step-{step:06d}"
            assert wait_until(saved.is_dir, processes[0]), log.read_text()
            for process in processes:
                process.kill()
            assert finish(*processes) == [-9, -9]
        assert finish(*start_ranks(2, log, fit, killed, backend, data)) == [0, 0], log.read_text()
    assert log.read_text().count("continuing from") == len(kills)
    ours, theirs = last(killed, STEPS), last(whole, STEPS)
    assert ours.keys() == theirs.keys() and any(key.startswith("discriminator/") for key in ours)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    felt = records(whole, "train/adaptive_weight")
    assert list(felt) == list(range(DISC_START + 1, STEPS + 1))
    assert all(0 < weight <= 1e4 / (3 * 64 * 64) for weight in felt.values())


def test_a_kill_changes_nothing(photographs, tmp_path):
    compare(shards_over_http, photographs, tmp_path, "aot_eager", kills=(6,))
