"""`push`, and commands on models of the hub, against a server on this machine that answers as the hub does."""

import json
import subprocess
import sys

import pytest
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.packaged import COMPACT
from tests.conftest import ROOT
from tests.hub_stand_in import StandIn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run's folder, as the trainer leaves one."""
    folder = tmp_path_factory.mktemp("secret-place") / "my-run"
    KLAutoencoder(block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder / "export")
    KLAutoencoder.from_pretrained(folder / "export").save_pretrained(folder / "export")
    config = {
        "output_dir": str(folder),
        "data": {
            "train": "some/photographs:small@main",
            "validation": str(folder / "held-out"),
            "resolution": 64,
        },
        "model": {"pretrained": str(folder / "start"), "latent_channels": 4},
        "loss": {"reconstruction": "l1"},
        "validation": {"lpips_net": "alex"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    last = {"validation/psnr": 27.126, "validation/ssim": 0.8, "validation/lpips": 0.1234}
    lines = [{"step": 0, "validation/psnr": 10.0}, {"step": 1, "train/loss": 1.0}, {"step": 9, **last}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    (folder / "samples").mkdir()
    for step, colour in ((0, "red"), (9, "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "samples" / f"step-{step:06d}.png")
    return folder


@pytest.fixture(scope="module")
def hub(run):
    with StandIn((run / "export" / "config.json").read_bytes()) as hub:
        yield hub


def test_a_dry_run_writes_what_would_be_pushed(run, tmp_path, capsys):
    output = tmp_path / "published"
    command = ["push", str(run), "--to", "me/vae", "--license", "apache-2.0", "--dry-run", "-o", str(output)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{output}\n"
    names = {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "reconstructions.png"}
    assert {path.name for path in output.iterdir()} == names
    AutoencoderKL.from_pretrained(output)
    assert Image.open(output / "reconstructions.png").getpixel((0, 0)) == (0, 0, 255)
    card = ModelCard.load(output / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == (
        "diffusers", "apache-2.0", ["some/photographs"]
    )  # fmt: skip
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"psnr": 27.126, "ssim": 0.8, "lpips": 0.1234} and card.data.model_name == "vae"
    assert "| PSNR (dB) | SSIM | LPIPS (alex) |\n|---|---|---|\n| 27.13 | 0.800 | 0.123 |" in card.text
    assert 'AutoencoderKL.from_pretrained("me/vae")' in card.text and "pretrained: start" in card.text
    for path in output.iterdir():
        content = path.read_bytes()
        assert (
            b"secret-place" not in content
            and b"my-run" not in content
            and str(tmp_path).encode() not in content
        )


def test_a_dry_run_of_a_model_without_a_run(tmp_path):
    assert main(["push", "compact", "--to", "me/compact", "--dry-run", "-o", str(tmp_path / "p")]) == 0
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert (
        card.data.eval_results is None and card.data.license is None and card.data.library_name == "diffusers"
    )
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "entropy_model.safetensors", "README.md"
    }  # fmt: skip
    copied = (tmp_path / "p" / "entropy_model.safetensors").read_bytes()
    assert copied == (COMPACT / "entropy_model.safetensors").read_bytes()


def through(url, commands, folder):
    """Run commands in one new interpreter with the hub at `url`; exit codes, and the lines on stderr."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_ENDPOINT": url, "HF_HOME": str(folder),
                   "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_secret"}  # fmt: skip
    program = (
        f"from kl_autoencoder.cli.main import main\nfor words in {commands!r}: print(main(words), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240
    )
    return [int(line) for line in done.stdout.splitlines() if len(line) == 1], done.stderr.splitlines()


def test_pushed_files_are_those_of_the_dry_run(run, hub, tmp_path):
    push = ["push", str(run), "--to", "me/vae", "--license", "mit"]
    commands = [[*push, "--private"], [*push, "--dry-run", "-o", str(tmp_path / "dry")],
                ["push", str(run), "--to", "them/vae"], ["info", "me/gated"], ["info", "me/absent"],
                ["info", "me/pickled"]]  # fmt: skip
    codes, errors = through(hub.url, commands, tmp_path / "home")
    assert codes == [0, 0, 2, 2, 2, 2], errors
    assert hub.created[0]["name"] == "vae" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()}
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == written
    assert load_file(tmp_path / "dry" / "diffusion_pytorch_model.safetensors")
    errors = [line for line in errors if not line.startswith("importing ")]  # after 20 seconds
    assert len(errors) == 4, "\n".join(errors)
    refused, gated, absent, pickled = [line for line in errors if line.startswith("kl-autoencoder: error: ")]
    assert "them/vae: the hub refuses (HTTP 403)" in refused
    assert "me/gated: is gated; ask for access on its page" in gated
    assert "me/absent: no such model on the hub, or a private one" in absent
    assert "me/pickled: no autoencoder with .safetensors weights in it" in pickled
    assert not [path for path in hub.asked if path.endswith(".bin")]  # pickles are not even asked for
    assert all(len(line) < 400 for line in (refused, gated, absent, pickled))


def test_a_hub_that_cannot_be_reached_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for command in (["info", "me/vae"], ["push", str(run), "--to", "me/vae"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "me/vae: the hub (http://127.0.0.1:9) cannot be reached" in told and told.count("\n") == 1


def test_without_a_token_nothing_is_sent(run, monkeypatch, capsys):
    monkeypatch.setattr("kl_autoencoder.models.publishing.hub.get_token", lambda: None)
    assert main(["push", str(run), "--to", "me/vae"]) == 2
    assert "me/vae: pushing needs a token that may write" in capsys.readouterr().err
