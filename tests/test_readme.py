"""The README's Python runs as it is printed, in a folder that holds what it names; so do commands of the pages."""

import re
import string

import pytest
import torch
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main as command
from kl_autoencoder.inference import dispatch
from kl_autoencoder.inference.executor import Executor
from kl_autoencoder.networks.convolutional import Decoder, Encoder
from tests.conftest import ROOT
from tests.models.test_autoencoder_kl import pipeline_parts

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "kl_autoencoder").glob("*/README.md"))]
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```\n(kl-autoencoder .*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("kl-autoencoder demo")  # which serves until it is ended: tests/demo/test_page.py
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a trained run, photographs, and a Stable Diffusion pipeline, all small."""
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "runs" / "quickstart" / "export")
    vae.save_single_file(tmp_path / "vae.safetensors")
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photo.jpg", tmp_path / "photos" / "cat.jpg"):
        Image.fromarray(data.chelsea()[:77, :101]).save(path)
    stable_diffusion(vae).save_pretrained(tmp_path / "stable-diffusion")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stable_diffusion(vae):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    return StableDiffusionPipeline(
        vae=vae, tokenizer=tokenizer, scheduler=DDIMScheduler(), **pipeline_parts(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_every_python_block_runs(folder):
    assert len(BLOCKS) >= 2
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert Image.open(folder / "reconstruction.png").size == (101, 77)
    assert names["latents"].shape == (1, 4, 10, 13) and names["image"].size == (64, 64)


def test_the_first_block_takes_the_fast_path(folder, monkeypatch):
    """Encoder and decoder are executed in pieces, once each, and never as a whole, unless the image is small."""
    monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", 0)
    runs, run = [], Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, of, x: runs.append(type(of)) or run(self, of, x))
    monkeypatch.setattr(Encoder, "forward", None)
    monkeypatch.setattr(Decoder, "forward", None)
    assert "from_pretrained" in BLOCKS[0] and "no_grad" not in BLOCKS[0]
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert runs == [Encoder, Decoder]


def test_every_command_runs(folder):
    assert len(COMMANDS) >= 5
    (folder / "vae.safetensors").unlink()
    for line in COMMANDS:
        assert command(line.split()[1:]) == 0, line
    assert Image.open(folder / "decoded" / "cat.png").size == (101, 77)
