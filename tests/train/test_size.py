"""The memory that a configuration would need is estimated, and refused where there is less, before any work."""

import math

import psutil
import pytest
import torch

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference import memory
from tests.conftest import ROOT
from train.__main__ import main
from train.autoencoder.size import check_held_out, check_step, check_weights, device_memory, readable
from train.config import Config, build

GB = 10**9


def config(**sections):
    return build(Config, {"output_dir": "run", "data": {"train": "photos"}} | sections)


def test_sizes_are_readable():
    sizes = [0, 999, 1000, 999_499, 999_600, 618_475_290_624, 2 * 10**15, 10**20]
    assert [readable(n) for n in sizes] == [
        "0 bytes", "999 bytes", "1 kB", "999 kB", "1 MB", "618 GB", "2 PB", "1e+05 PB",
    ]  # fmt: skip


@pytest.mark.parametrize("ema, copies", [(True, 5), (False, 4)])
def test_the_estimate_is_what_training_holds(ema, copies):
    """Weights, gradients, Adam's moments and the average of the published kl-f8: 83,653,863 parameters."""
    sd = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    wanted = 83_653_863 * 4 * copies
    check_weights(config(model=sd, ema={"enabled": ema}), wanted)
    with pytest.raises(ValueError, match=r"=\[128, 256, 512, 512\].* would need 1.\d+ GB to train"):
        check_weights(config(model=sd, ema={"enabled": ema}), wanted - 1)


def test_a_step_keeps_at_least_what_is_estimated():
    """The estimate is one input for each ResNet block; the saved tensors of a real step's graph are more."""
    given = config(
        model={"block_out_channels": [8, 16], "norm_num_groups": 4},
        data={"train": "photos", "batch_size": 2, "resolution": 32},
    )
    vae, saved = KLAutoencoder(**given.model.options()), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        vae(torch.zeros(2, 3, 32, 32)).sample.sum()
    kept = sum(t.numel() * 4 for t in saved.values())
    least = 2 * 3 * (8 * 32**2 + 16 * 16**2) * 4
    assert least <= kept
    check_step(given, vae.config, least)
    with pytest.raises(ValueError, match="data.batch_size: 2 of 32x32 would need 295 kB for one step"):
        check_step(given, vae.config, least - 1)


def test_held_out_images_are_counted():
    check_held_out(10, 100, 10 * 3 * 100**2)
    with pytest.raises(ValueError, match="data.validation_images: 11 of 100x100 would need 330 kB a rank"):
        check_held_out(11, 100, 10 * 3 * 100**2)


def test_a_rank_has_its_share_of_what_the_container_may_use(monkeypatch):
    total = psutil.virtual_memory().total
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "limit_of_control_group", lambda: math.inf)
    assert device_memory(torch.device("cpu")) == total
    monkeypatch.setattr(memory, "limit_of_control_group", lambda: 900_000)
    assert device_memory(torch.device("cpu")) == 900_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert device_memory(torch.device("cpu")) == 300_000


@pytest.mark.parametrize("override, message", [
    ("model.block_out_channels=[16, 8192, 64, 96]", "would need 72.8 GB to train; allowed: at most"),
    ("model.block_out_channels=[16, 65536, 64, 96]", "(16, 65536, 64, 96), 1: 2.3e+11 parameters; allowed: up to"),
    ("model.latent_channels=9223372036854775807", "9223372036854775807; allowed: at least 1 and at"),
    ("model.layers_per_block=4611686018427387904", "and at most 32"),
    ("data.validation_resolution=65536", "65536; allowed: at least 1 and at most 8,192"),
    ("data.batch_size=10000", "data.batch_size: 10000 of 256x256 would need"),
    ("loss.adversarial={weight: 0.5, disc_start: 1, channels: 4096, layers: 10}", "channels=4096, layers=10 w"),
])  # fmt: skip
def test_runs_too_large_for_the_memory_are_refused_in_one_line(tmp_path, capsys, override, message):
    arguments = [
        str(ROOT / "configs" / "quickstart.yaml"),
        f"output_dir={tmp_path / 'run'}",
        "data.resolution=256",
    ]
    assert main([*arguments, "model.start=random", override]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error and len(error) < 300
