"""configs/from_zero.py runs as it is, with few steps on small photographs."""

import re
import runpy
import sys

import diffusers
from PIL import Image

from kl_autoencoder.models.run_folder import read_metrics
from tests.conftest import ROOT
from tests.processes import finish, start


def run(*arguments):
    sys.argv = ["from_zero.py", *arguments]
    runpy.run_path(str(ROOT / "configs" / "from_zero.py"), run_name="__main__")


def test_from_zero_to_your_own_vae(photographs, tmp_path):
    log, output = tmp_path / "log", tmp_path / "mine"
    words = ["--photographs", str(photographs), "--steps", "3", "--size", "64", "--output", str(output)]
    assert finish(start(log, run, *words)) == [0], log.read_text()
    told = log.read_text()
    assert max(record["step"] for record in read_metrics(output / "run" / "metrics.jsonl")) == 3
    assert "photograph (1, 3, 64, 64) -> latents (1, 4, 8, 8)" in told
    assert float(re.search(r"diffusers computes the same, within (\S+)", told)[1]) < 1e-5
    assert float(re.search(r"compact.png: PSNR (\S+) dB", told)[1]) > 15
    assert Image.open(output / "between.png").size == (5 * 64 + 4 * 4, 64)
    diffusers.AutoencoderKL.from_pretrained(output / "published")
