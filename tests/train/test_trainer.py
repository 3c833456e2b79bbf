"""The trainer: right gradients on any number of ranks, repeatable, resumable, and it learns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from kl_autoencoder import KLAutoencoder
from tests.conftest import ROOT, backbone_missing
from tests.processes import finish, start_ranks
from tests.train.runs import equal, make, records, small_config, weights, write_odd_images
from train.__main__ import main, print_error
from train.autoencoder import task
from train.config import to_yaml
from train.loop import journal, launch

RECORDED = Path(__file__).parent / "recorded_losses.json"


@pytest.fixture
def few_statistics(monkeypatch):
    """Let `main` measure the scaling factor from 16 crops as well."""
    monkeypatch.setattr(task, "STATISTICS_SAMPLES", 16)


def test_a_run_writes_its_metrics_pictures_checkpoints_and_export(small, photographs, tmp_path):
    config = small(tmp_path, log={"tensorboard": True})
    summary = make(config).fit()
    for name in ("config.yaml", "metrics.jsonl", "samples/step-000006.png", "checkpoints/step-000006"):
        assert (tmp_path / name).exists()
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    grid = Image.open(summary["picture"])
    assert grid.width >= 3 * 32 and grid.height >= 3 * 32
    exported, ema = AutoencoderKL.from_pretrained(summary["export"]), weights(tmp_path, 6, "ema")
    assert equal(dict(exported.state_dict()), ema)
    card = (summary["export"] / "README.md").read_text()
    assert (
        str(tmp_path) not in card
        and str(photographs.parent) not in card
        and f"Trained on `{photographs.name}`" in card
        and f"{summary['after']['psnr']:.2f}" in card
        and "block_out_channels" in card
    )
    assert set(records(tmp_path, "train/loss")) == set(range(1, 7))


def test_the_scaling_factor_gives_the_latents_unit_deviation(small, tmp_path):
    trainer = make(small(tmp_path), statistics_samples=512)
    vae = KLAutoencoder.from_pretrained(trainer.fit()["export"])
    loader = iter(trainer.task.data.loader(0))
    with torch.no_grad():
        posteriors = [vae.encode(next(loader)["images"]).latent_dist for _ in range(64)]
    z = torch.cat([p.sample(torch.Generator().manual_seed(i)) for i, p in enumerate(posteriors)])
    assert vae.scale(z).std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["l1", "l2", "gaussian", "laplace", "bernoulli"])
def test_one_batch_overfits(small, tmp_path, kind):
    """Forty steps on the same four crops: every likelihood at least halves the squared error."""
    config = small(
        tmp_path, loss={"reconstruction": kind, "kl": {"weight": 1e-6}}, optimizer={"learning_rate": 1e-2}
    )
    trainer = make(config)
    batch = next(iter(trainer.task.data.loader(0)))

    def error():
        with torch.no_grad():
            return (trainer.task.vae(batch["images"]).sample - batch["images"]).square().mean().item()

    before = error()
    for _ in range(40):
        trainer.train_step([batch])
    assert error() < before / 2


def test_the_first_fifty_losses_equal_the_recorded_ones(small, tmp_path):
    """A refactor changes no number. To record anew after a change of mathematics: delete the file, run, say why."""
    make(
        small(tmp_path, train={"steps": 50, "gradient_accumulation": 2}, optimizer={"learning_rate": 3e-4})
    ).fit()
    losses = [loss for _, loss in sorted(records(tmp_path, "train/loss").items())]
    if not RECORDED.exists():
        RECORDED.write_text(json.dumps([round(loss, 6) for loss in losses]))
        pytest.fail(f"{RECORDED.name} did not exist; it is written now")
    np.testing.assert_allclose(losses, json.loads(RECORDED.read_text()), rtol=1e-3)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(photographs, tmp_path, few_statistics):
    config = ROOT / "configs" / "quickstart.yaml"
    short = ["train.steps=3", "data.resolution=64", "data.batch_size=2", "log.tensorboard=false",
             "model.block_out_channels=[16, 16]", f"data.train={photographs}", "data.validation_images=4",
             "data.validation_resolution=64"]  # fmt: skip
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([str(config), *short, f"output_dir={tmp_path / name}", f"seed={seed}"]) == 0
    assert equal(weights(tmp_path / "a", 3), weights(tmp_path / "b", 3))
    assert not equal(weights(tmp_path / "a", 3), weights(tmp_path / "c", 3))


def test_a_continued_run_ends_with_the_same_weights(small, tmp_path):
    both = {"train": {"steps": 6, "gradient_accumulation": 2}, "loss": {"reconstruction": "gaussian"}}
    whole = make(small(tmp_path / "whole", **both))
    whole.fit()
    make(small(tmp_path / "parts", **both | {"train": {"steps": 3, "gradient_accumulation": 2}})).fit()
    make(small(tmp_path / "parts", **both)).fit()
    for name in ("model", "ema", "optimizer"):
        assert equal(weights(tmp_path / "whole", 6, name), weights(tmp_path / "parts", 6, name))


def test_decoder_only_leaves_the_encoder_and_the_scaling_alone(small, tmp_path):
    start = KLAutoencoder(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2, scaling_factor=0.7
    )
    start.save_single_file(tmp_path / "start.safetensors")
    config = small(tmp_path / "run", train={"steps": 3, "decoder_only": True})
    object.__setattr__(config, "model", type(config.model)(pretrained=str(tmp_path / "start.safetensors")))
    after = KLAutoencoder.from_pretrained(make(config).fit()["export"])
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, start.state_dict()[k])}
    assert {k.split(".")[0] for k in moved} == {"decoder", "post_quant_conv"}
    assert after.config.scaling_factor == 0.7


@pytest.mark.parametrize("options", [
    {"mixed_precision": "bf16"}, {"gradient_checkpointing": "no"}, {"gradient_checkpointing": "blocks"},
    {"compile": True},
], ids=str)  # fmt: skip
@torch._inductor.config.patch({"cpp.simdlen": 0})  # unvectorized, there is a quarter less to compile
def test_the_ways_to_run_a_step_agree(small, tmp_path, options):
    # inductor takes seconds for each C++ kernel; test_configs and test_convolutional trace every kind of layer
    few_kernels = {"block_out_channels": [8], "layers_per_block": 1, "mid_block_add_attention": False}
    model, losses = few_kernels if "compile" in options else {}, []
    for name, more in (("plain", {}), ("other", options)):
        torch._dynamo.reset()
        make(small(tmp_path / name, model=model, train={"steps": 3, **more})).fit()
        losses.append(list(records(tmp_path / name, "train/loss").values()))
    np.testing.assert_allclose(*losses, rtol=3e-2 if "mixed_precision" in options else 1e-4)


def test_images_per_second_leave_out_the_time_of_validation(small, tmp_path, monkeypatch):
    run, clock = make(small(tmp_path)), [0.0]
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run.journal.start_window(step=0)
    clock[0] = 10.0
    with run.journal.clock_stopped():
        clock[0] = 40.0
    clock[0] = 50.0
    run.journal.add({"loss": torch.ones(())})
    assert run.journal.close_window(step=5) == ({"loss": 1.0}, 5 / 20)
    clock[0] = 60.0
    run.journal.add({"loss": torch.ones(())})
    assert run.journal.close_window(step=10)[1] == 5 / 10


def test_the_announced_threads_come_with_the_cores_that_other_programs_use():
    assert launch.say_threads(2, 1, 2, 0.2) == "2 torch threads a rank (OMP_NUM_THREADS) on 2 cores"
    assert launch.say_threads(1, 1, 2, 9.0) == "1 torch thread a rank (OMP_NUM_THREADS) on 2 cores"
    assert ", 1.4 of which other programs use: OMP_NUM_THREADS=1" in launch.say_threads(2, 1, 2, 1.4)
    assert "8.0 of which" in launch.say_threads(2, 4, 8, 12.0)


@pytest.mark.parametrize("given, expected", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
])  # fmt: skip
def test_waiting_threads_soon_sleep_unless_the_user_has_set_otherwise(given, expected):
    """libgomp reads GOMP_SPINCOUNT when torch is imported, so it has to be set before that."""
    program = ("import os, sys, train.__main__ as program; program.share_the_cores(); "
               "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)")  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | given, capture_output=True, text=True
    )
    assert run.stdout.split() == [expected, "False"], run.stderr


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("widths", [[8, 16], [64, 64]], ids=["narrow", "wide enough for winograd_training"])
def test_two_ranks_give_the_gradients_of_one_process_with_the_doubled_batch(photographs, tmp_path, widths):
    """The gradients of both networks, with LPIPS (where its weights are on this machine), KL, a learned likelihood
    scale, the adaptive weight, LeCam and R1."""
    from tests.train.rank_gradients import write_gradients

    with_lpips, log = not backbone_missing("squeeze"), tmp_path / "log.txt"
    for ranks, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(ranks)
        processes = start_ranks(ranks, log, write_gradients, photographs, folder, widths, batch, with_lpips)
        assert finish(*processes) == [0] * ranks, log.read_text()
    one, two = (load_file(tmp_path / n / f"gradients-of-{n}-ranks.safetensors") for n in "12")
    assert one.keys() == two.keys() and {"autoencoder.log_scale", "discriminator.main.0.weight"} <= one.keys()
    for key in one:
        assert one[key].any(), key
        scale = one[key].abs().max().item()
        # 5e-7 for the biases of the logits and of attention's keys, in which terms of about 1 cancel
        atol = 1e-4 * scale + 5e-7
        torch.testing.assert_close(
            two[key], one[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )


# ------------------------------------------------------------------ bad input


def test_a_folder_of_odd_images_trains_to_the_end(photographs, tmp_path, capsys, few_statistics):
    """A tenth of the files is damaged and a tenth too small: each of these is named, and replaced by another."""
    damaged = write_odd_images(tmp_path / "odd")
    assert len(damaged) == len(list((tmp_path / "odd").iterdir())) / 10
    config = small_config(
        tmp_path / "odd",
        tmp_path / "run",
        data={"batch_size": 8, "validation": str(photographs), "num_workers": 1},
        train={"steps": 5},
    )
    (tmp_path / "odd.yaml").write_text(to_yaml(config))
    assert main([str(tmp_path / "odd.yaml")]) == 0
    said = capsys.readouterr().out
    summary = said[said.index("8 images were skipped (4 too small, 4 unreadable):") :].splitlines()[1:9]
    assert sum("): too small: 1x1 pixels" in line for line in summary) == 4
    unreadable = sorted(line.split("odd/")[1] for line in summary if "): unreadable: " in line)
    for name, line in zip(sorted(damaged), unreadable, strict=True):
        assert line.startswith(f"{name} (row") and len(line.split("): ")[1]) > 15
    losses = records(tmp_path / "run", "train/loss")
    assert list(losses) == [1, 2, 3, 4, 5] and all(0 < loss < 2 for loss in losses.values())
    assert (tmp_path / "run" / "export" / "config.json").exists()


@pytest.mark.parametrize("overrides, message", [
    ("train.steps=many", "train.steps: 'many'; allowed: a whole number"),
    ("train.stepz=7", "train.stepz: no such key; did you mean train.steps?"),
    ("model.block_out_channels=[8,", "model.block_out_channels: '[8,' is not a YAML value"),
    ("data.train=nowhere/at-all/", "data.train: 'nowhere/at-all/' is no file or folder here"),
    ("data.validation=no/such/folder", "data.validation: 'no/such/folder' is no file or folder here"),
    ("data.train=EMPTY", "data.train: no images in"),
    ("data.resolution=33", "data.resolution: 33; allowed: a multiple of the network's downsampling, 8"),
    ("data.resolution=8", "data.resolution: 8; allowed: at least 17 with loss.perceptual.net=squeeze"),
    ("data.channels=2", "data.channels: 2; allowed: 1, 3, 4"),
    ("data.validation_resolution=100", "data.validation_resolution: 100; allowed: a multiple of"),
    ("data.resolution=4096", "data.resolution: 4096, larger than the"),
    ("data.batch_size=0", "data.batch_size: 0; allowed: at least 1"),
    ("model.norm_num_groups=5", "allowed: multiples of norm_num_groups (5)"),
    ("model.in_channels=1", "model.in_channels: 1; allowed: data.channels, 3"),
    ("optimizer.name=lion", "optimizer.name: 'lion'; allowed: adamw"),
    ("train.mixed_precision=fp16", "train.mixed_precision: fp16 on a CPU; allowed there: no, bf16"),
    ("loss.adversarial={weight: 0.5, disc_start: 99999}", "loss.adversarial.disc_start: 99999 (felt from step"),
    ("loss.adversarial={weight: 0.5, disc_start: 9, layers: 5}", "allowed: at least 96 for a disc"),
    ("model={pretrained: no/such/folder}", "model.pretrained: 'no/such/folder' cannot be loaded: no such folder"),
    ("model={pretrained: EMPTY}", "cannot be loaded: "),
    ("output_dir=FILE/run", "cannot be written to (Not a directory)"),
    ("output_dir=FILE", "cannot be written to (File exists)"),
])  # fmt: skip
def test_mistakes_are_reported_in_one_line_before_any_work(tmp_path, capsys, overrides, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    overrides = overrides.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file"))
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), f"output_dir={tmp_path / 'run'}", overrides]
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert (tmp_path / "file").read_text() == "kept"
    for name in ("checkpoints", "metrics.jsonl", "samples", "config.yaml"):
        assert not (tmp_path / "run" / name).exists()


def test_an_error_of_a_library_is_printed_in_one_line(capsys):
    print_error(OSError("We couldn't connect.\nCheckout your connection.\n"))
    assert capsys.readouterr().err == "error: We couldn't connect. Checkout your connection.\n"


def test_a_run_without_the_lpips_weights_says_how_to_get_them_or_trains_without_the_term(
    tmp_path, monkeypatch, capsys, few_statistics
):
    checkpoints = tmp_path / "home" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"damaged")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    command = [str(ROOT / "configs" / "quickstart.yaml"), "train.steps=1", "data.resolution=32",
               "model.block_out_channels=[16, 16]", "log.tensorboard=false",
               "data.validation_images=4", "data.validation_resolution=64",
               f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main([*command, "loss.perceptual.required=true"]) == 2
    message = capsys.readouterr().err
    assert (
        "squeezenet1_1-b8a52dc0.pth" in message
        and "TORCH_HOME" in message
        and "loss.perceptual.weight=0" in message
    )
    assert main(command) == 0
    assert "WITHOUT the perceptual term" in capsys.readouterr().out
