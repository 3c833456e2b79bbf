"""The folder of a run that has not ended, or was killed, loads as the model of its newest whole checkpoint."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.run_folder import newer_checkpoint
from tests.processes import finish, start
from tests.train.runs import small_config
from tests.train.test_restart import command, everything, train


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """A run of six steps with its export and the checkpoints of steps 4 and 6; one without a moving average."""
    folder = tmp_path_factory.mktemp("runs")
    for name, ema in (("run", True), ("bare", False)):
        config = everything(photographs, folder / name, steps=6, every=2)
        if not ema:
            config = small_config(photographs, folder / name, ema={"enabled": False}, train={"steps": 2})
        log = folder / f"{name}.txt"
        assert finish(start(log, train, command(config, folder / f"{name}.yaml"))) == [0], log.read_text()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A run's folder as a kill between steps 6 and 8 leaves it, before any export."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    shutil.rmtree(folder / "export")
    return folder


def assert_weights(vae, path, prefix=""):
    expected = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
    found = vae.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_a_killed_run_loads_as_the_moving_average_of_its_newest_checkpoint(run, capsys):
    vae = load_model(str(run), "cpu", None)
    assert_weights(vae, run / "checkpoints" / "step-000006" / "ema.safetensors")
    assert vae.config.norm_num_groups == 4 and vae.config.latent_channels == 2  # which no tensor tells
    assert f"{run}: step 6 (moving average), from " in capsys.readouterr().err
    older = load_model(str(run / "checkpoints" / "step-000004"), "cpu", None)
    assert_weights(older, run / "checkpoints" / "step-000004" / "ema.safetensors")


def test_a_run_without_a_moving_average_loads_as_its_weights(finished, tmp_path, capsys):
    run = tmp_path / "bare"
    shutil.copytree(finished / "bare", run)
    shutil.rmtree(run / "export")
    vae = load_model(str(run), "cpu", None)
    assert_weights(vae, run / "checkpoints" / "step-000002" / "model.safetensors", "vae.")
    assert "step 2 (without a moving average)" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_passed_over(run):
    path = run / "checkpoints" / "step-000006" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert newer_checkpoint(run).name == "step-000004"
    shutil.rmtree(run / "checkpoints" / "step-000004")
    with pytest.raises(ValueError, match="no model in it .* no whole checkpoint"):
        load_model(str(run), "cpu", None)


def test_an_export_counts_until_a_checkpoint_is_newer(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    assert json.loads((run / "export" / "training.json").read_text()) == {"step": 6, "samples": 24}
    assert newer_checkpoint(run) is None
    scaled = load_model(str(run), "cpu", None).config.scaling_factor
    assert scaled != 0.18215 and "step" not in capsys.readouterr().err
    (run / "export" / "training.json").write_text('{"step": 5, "samples": 20}')
    assert newer_checkpoint(run).name == "step-000006"
    (run / "export" / "training.json").unlink()  # of another version: an export is what was meant
    assert newer_checkpoint(run) is None


def test_commands_take_it(run, tmp_path, capsys):
    Image.fromarray(data.chelsea()[:64, :64]).save(tmp_path / "cat.png")
    assert main(["export", str(run), "-o", str(tmp_path / "vae")]) == 0
    assert_weights(
        KLAutoencoder.from_pretrained(tmp_path / "vae"), run / "checkpoints/step-000006/ema.safetensors"
    )
    assert (
        main(["reconstruct", str(tmp_path / "cat.png"), "--model", str(run), "-o", str(tmp_path / "a.png")])
        == 0
    )
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    report = ["-o", str(tmp_path / "report"), "--lpips", "squeeze"]
    assert main(["evaluate", "--model", str(run), "--data", str(tmp_path / "cat.png"), *report]) == 0
    assert capsys.readouterr().err.count("step 6 (moving average)") == 3
    (tmp_path / "latents").mkdir()
    # it would change a checkpoint
    assert main(["set-scaling", str(run), "--from", str(tmp_path / "latents")]) != 0
    assert (run / "checkpoints" / "step-000006" / "config.json").read_text().count("0.18215") == 1
