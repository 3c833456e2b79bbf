"""`python -m train CONFIG --smoke`: each kind of recipe through all of its phases, tiny, on a CPU, offline."""

import re
import socket
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState

from kl_autoencoder.models.packaged import PACKAGED
from tests.conftest import ROOT
from tests.processes import finish, start_ranks
from train import __main__ as program
from train.config import load_config
from train.smoke import STEPS, shrink

# test_configs takes every recipe through its phases, as these do; these differ from another in numbers alone
ALIKE = {"finetune_small", "kl_f8_compact", "kl_f8_compact_part2", "kl_f8_compact_part3", "sd3_f8c16"}
CONFIGS = [path for path in sorted(ROOT.glob("configs/*.yaml")) if path.stem not in ALIKE]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without data or runs, on a machine without a network and without LPIPS's weights."""

    def unreachable(*_, **__):
        raise OSError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_pass_on_a_cpu_offline_and_leave_nothing(path, elsewhere, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(program, "print_summary", kept.append)
    assert program.main([str(path), "--smoke"]) == 0
    said = capsys.readouterr().out
    assert "smoke test passed" in said
    assert len(kept) == 1 and (path.stem == "codec_entropy" or kept[0]["after"]["psnr"] > 5)
    assert not kept[0]["export"].exists()
    assert [entry.name for entry in elsewhere.iterdir()] in ([], ["torch_home"])  # where a download was tried
    wanted = load_config(path)
    for key in ("data.train", "model.pretrained", "train.compile"):
        section, name = key.split(".")
        value = getattr(getattr(wanted, section), name)
        assert (f"{key}: " in said) == (value not in (None, False, "sample-photographs", *PACKAGED))


def test_two_ranks_pass_and_say_so_once(tmp_path):
    """They leave the group of processes at the end of training, and the folder goes after that."""
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "--smoke"]
    log = tmp_path / "log"
    assert finish(*start_ranks(2, log, program.main, arguments)) == [0, 0], log.read_text()
    said = log.read_text()
    assert said.count("smoke test passed") == 1 and said.count("after training") == 1


def test_a_smoke_test_shrinks_sizes_and_keeps_everything_else(tmp_path):
    """kl_f8 with every adversarial delay: the six steps are all different phases, and no other key changes."""
    adversarial = {"disc_warmup_steps": 10_000, "ramp_steps": 20_000, "lecam_weight": 0.1, "r1_weight": 1.0}
    config = load_config(
        ROOT / "configs" / "kl_f8.yaml", [f"loss.adversarial.{k}={v}" for k, v in adversarial.items()]
    )
    small = shrink(config, tmp_path)
    felt = small.loss.adversarial.disc_start + small.loss.adversarial.disc_warmup_steps
    assert 0 < small.loss.adversarial.disc_start < felt < felt + small.loss.adversarial.ramp_steps < STEPS - 1
    assert small.train.steps == STEPS and small.validation.every == small.checkpoint.every == STEPS // 2
    assert small.output_dir == str(tmp_path)  # never the run's own folder
    kept = {
        "weight": 0.5,
        "loss": "hinge",
        "adaptive": True,
        "lecam_weight": 0.1,
        "r1_weight": 1.0,
        "layers": 3,
    }
    assert {key: getattr(small.loss.adversarial, key) for key in kept} == kept
    assert small.train.mixed_precision == "bf16" and small.ema == config.ema
    assert len(small.model.block_out_channels) == 4 and small.model.latent_channels == 4
    again = shrink(small, tmp_path)
    assert again == small


def test_data_and_models_that_are_here_are_used(tmp_path, photographs):
    (tmp_path / "export").mkdir()
    config = load_config(ROOT / "configs" / "kl_f8_512.yaml", [
        f"data.train={photographs}", f"model.pretrained={tmp_path / 'export'}", "data.horizontal_flip=false",
    ])  # fmt: skip
    small = shrink(config, tmp_path / "run")
    assert small.data == replace(
        config.data, resolution=64, batch_size=2, num_workers=1, validation_images=2, shuffle_buffer=8
    )
    assert small.model == config.model


def test_the_example_in_the_help_text_loads(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    example = re.search(
        r"example: python -m train (\S+\.yaml) (.*)$", capsys.readouterr().out.replace("\n", " ")
    )
    config = load_config(ROOT / example[1], example[2].split())
    assert config.data.train == "FOLDER"


def test_a_mistake_in_a_smoke_test_is_one_line(elsewhere, capsys):
    path = ROOT / "configs" / "quickstart.yaml"
    assert program.main([str(path), "--smoke", "model.start=enlargement", "model.latent_channels=2"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("error: model.start")]) == 1
