"""Progress of long work: a bar on a terminal, lines in a log, and that every command has it."""

import os
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from PIL import Image

from kl_autoencoder import KLAutoencoder, progress
from kl_autoencoder.cli.main import main


@contextmanager
def terminal(monkeypatch):
    """A pseudo-terminal of no size as stderr, as `script` makes them; yields a list of what it is sent."""
    ours, theirs = os.openpty()
    file, sent = os.fdopen(theirs, "w"), []

    def read():
        with suppress(OSError):  # what Linux says when the other end is closed
            while data := os.read(ours, 4096):
                sent.append(data.decode())

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", file)
        patched.setattr(progress, "ON_A_TERMINAL", (0.0, 0.02))
        yield sent
    file.close()
    reader.join()
    os.close(ours)


def test_a_bar_on_a_terminal_before_the_first_item_is_done(monkeypatch):
    with terminal(monkeypatch) as sent:
        for _ in progress.tracked(range(4), "encoding", "images"):
            time.sleep(0.1)
    told = "".join(sent)
    assert "encoding:   0%|" in told and "encoding:  75%|" in told and "3/4 images" in told
    assert not told.split("\r")[-2].strip()  # it is gone in the end


def test_lines_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(progress, "IN_A_FILE", (0.0, 0.05))
    with progress.Progress("starting"):
        time.sleep(0.2)
    with progress.Progress("encoding", 4, "images", initial=1) as bar:
        bar.update(0.5)
        bar.up_to(3)
        bar.up_to(2)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "starting, 00:00" and lines[-1].startswith("encoding:  75%, 3/4 images, 00:00<")
    assert len(lines) >= 4 and all("\r" not in line and line.strip() for line in lines)


def test_short_work_and_other_ranks_show_nothing(capsys, monkeypatch):
    list(progress.tracked(range(4), "encoding", "images"))
    monkeypatch.setattr(progress, "IN_A_FILE", (0.0, 0.01))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for _ in progress.tracked(range(2), "encoding", "images"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("encode in --model vae -o z.safetensors", ("encoding", 2)),
        ("reconstruct in --model vae -o out", ("reconstructing", 2)),
        ("encode-dataset --model vae --data in --size 64 -o data --workers 0 --device cpu", ("encoding", 2)),
        ("evaluate --model vae --data in --size 64 -o report", ("measuring", 2)),
        ("sample vae --size 64 --grid 2 -o grid.png", ("decoding", 4)),
        ("interpolate in/0.png in/1.png --model vae --steps 3 -o strip.png", ("decoding", 3)),
        ("attribute in/0.png --model vae --plus in --minus in --size 64 -o a.png", ("encoding minus", 2)),
        ("anomaly vae --reference in --data in --size 64 -o scores.csv", ("scoring", 2)),
        ("fp16-check vae --size 64", ("measuring", 9)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_every_command_shows_its_progress(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    KLAutoencoder(block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    begun, init = [], progress.Progress.__init__

    def noting(self, what, total=None, *more, **options):
        begun.append((what, total))
        init(self, what, total, *more, **options)

    monkeypatch.setattr(progress.Progress, "__init__", noting)
    assert main(command.split()) in (0, 1)
    assert begun[0] == ("importing torch and diffusers", None) and said in begun
    assert ("loading vae", None) in begun
