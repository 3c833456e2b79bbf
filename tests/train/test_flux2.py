"""Training FLUX.2's autoencoder: statistics of patches, asymmetric decoders, an export that pipelines load."""

import json

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline

from kl_autoencoder import KLAutoencoder, KLAutoencoderFlux2, LatentDataset, load_image
from kl_autoencoder.cli.main import main as command
from tests.models.test_autoencoder_kl import images
from tests.models.tiny_pipelines import run_pipeline, tiny_pipeline
from train.autoencoder.model import build_autoencoder
from train.autoencoder.task import AutoencoderTask
from train.config import load_config
from train.loop import trainer

NETWORK = [
    "block_out_channels=[16,16,16,16]",
    "norm_num_groups=4",
    "latent_channels=32",
    "layers_per_block=1",
]


@pytest.fixture(scope="module")
def recipe(photographs, tmp_path_factory):
    """(name, more overrides) -> the finished run's folder."""
    root = tmp_path_factory.mktemp("flux2")
    (root / "recipe.yaml").write_text(
        "loss: {perceptual: {weight: 0}}\nvalidation: {every: 0}\nema: {decay: 0.5}\n"
        "train: {steps: 2}\ncheckpoint: {every: 2}\noptimizer: {learning_rate: 1.0e-3}\n"
    )
    data = [f"data.{key}={value}" for key, value in {
        "train": photographs, "resolution": 32, "batch_size": 4, "num_workers": 0, "validation_images": 2,
    }.items()]  # fmt: skip

    def run(name, *more):
        config = load_config(root / "recipe.yaml", [*data, f"output_dir={root / name}", *more])
        trainer.Trainer(config, lambda run: AutoencoderTask(run, statistics_samples=48)).fit()
        return root / name

    return run


@pytest.fixture(scope="module")
def run(recipe):
    return recipe("whole", *(f"model.{key}" for key in ("kind=AutoencoderKLFlux2", *NETWORK)))


def test_the_statistics_are_those_of_patches_of_the_training_data(run, photographs):
    vae = AutoencoderKLFlux2.from_pretrained(run / "export")
    assert type(vae) is AutoencoderKLFlux2 and vae.bn.running_mean.shape == (128,)
    files = sorted(photographs.iterdir())
    with torch.no_grad():
        latents = [vae.encode(load_image(file, 32)).latent_dist.sample() for file in files]
    patches = Flux2Pipeline._patchify_latents(torch.cat(latents))
    spread = patches.std(dim=(0, 2, 3))
    # centre crops here, random ones there
    assert (vae.bn.running_mean - patches.mean(dim=(0, 2, 3))).abs().max() < 0.25 * spread.max()
    torch.testing.assert_close(vae.bn.running_var.sqrt(), spread, rtol=0.4, atol=0)
    assert not torch.allclose(vae.bn.running_var, torch.ones(128))
    card = (run / "export" / "README.md").read_text()
    assert "AutoencoderKLFlux2.from_pretrained" in card and "2x2 patches" in card


def test_a_new_narrower_decoder_for_an_encoder_that_exists(run, recipe):
    small = recipe(
        "small", f"model.pretrained={run / 'export'}", "model.decoder_block_out_channels=[8,8,8,12]",
        "train.decoder_only=true",
    )  # fmt: skip
    whole, vae = (AutoencoderKLFlux2.from_pretrained(folder / "export") for folder in (run, small))
    assert tuple(vae.config.decoder_block_out_channels) == (8, 8, 8, 12)
    assert vae.decoder.conv_in.weight.shape[0] == 12
    before, after = whole.state_dict(), vae.state_dict()
    kept = [name for name in after if name.startswith(("encoder.", "quant_conv.", "bn."))]
    assert len(kept) > 50 and all(torch.equal(before[name], after[name]) for name in kept)


def test_the_export_decodes_in_a_pipeline(run):
    pipe = tiny_pipeline("flux2")
    pipe.register_modules(vae=AutoencoderKLFlux2.from_pretrained(run / "export"))
    expected = run_pipeline(pipe, "flux2")
    pipe.register_modules(vae=KLAutoencoderFlux2.from_pretrained(run / "export"))
    torch.testing.assert_close(run_pipeline(pipe, "flux2"), expected, rtol=0, atol=1e-4)


def test_commands_take_it(run, photographs, tmp_path, capsys):
    model = str(run)
    assert command(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pipelines"] == ["flux2"] and len(facts["scaling"]["latents_std"]) == 128
    assert command(["info", str(run / "checkpoints" / "step-000002")]) == 0
    assert "128 channels of 2x2 patches" in capsys.readouterr().out

    picture = str(next(photographs.iterdir()))
    z = str(tmp_path / "z.safetensors")
    assert command(["encode", picture, "--model", model, "--scaled", "-o", z]) == 0
    assert command(["decode", z, "--model", model, "-o", str(tmp_path / "back.png")]) == 0
    vae = KLAutoencoderFlux2.from_pretrained(run / "export")
    with torch.no_grad():
        expected = vae(load_image(picture)).sample.clamp(-1, 1)
    torch.testing.assert_close(load_image(tmp_path / "back.png"), expected, rtol=0, atol=1.5 / 127)

    evaluated = ["evaluate", "--model", model, "--data", str(photographs), "--size", "64", "--limit", "4"]
    assert command([*evaluated, "-o", str(tmp_path / "report")]) == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["models"][run.name]["latent_channels"] == 32

    latents = str(tmp_path / "latents")
    encoded = [
        "encode-dataset",
        "--model",
        model,
        "--data",
        str(photographs),
        "--size",
        "32",
        "--store",
        "float32",
    ]
    assert command([*encoded, "--content", "mode", "--workers", "0", "-o", latents]) == 0
    row = LatentDataset(latents, vae.scaling)[0]
    assert row["latents"].shape == (128, 2, 2)
    with torch.no_grad():
        mode = vae.encode(load_image(sorted(photographs.iterdir())[0], 32)).latent_dist.mode()
    torch.testing.assert_close(row["latents"], vae.scale(mode)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="allowed: vae.scaling"):
        LatentDataset(latents, vae.config)
    assert command(["set-scaling", str(run / "export"), "--from", latents]) != 0
    assert "its own tensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoder_block_out_channels=[8]"], "model.decoder_block_out_channels: no key of AutoencoderKL"),
        (
            ["kind=AutoencoderKLFlux2", "scaling_factor=1.0"],
            "model.scaling_factor: no key of AutoencoderKLFlux2",
        ),
        (["kind=AutoencoderKLFlux2", "pretrained=compact"], "model.kind: given beside model.pretrained"),
    ],
)
def test_keys_of_the_other_class_are_refused(overrides, message, tmp_path):
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\ndata: {{train: x}}\n")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "a.yaml", [f"model.{override}" for override in overrides])


def test_an_autoencoder_kl_has_one_width_for_both_sides(tmp_path):
    KLAutoencoder(block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path)
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\ndata: {{train: x}}\n")
    more = [f"model.pretrained={tmp_path}", "model.decoder_block_out_channels=[4,4]"]
    with pytest.raises(ValueError, match="decoder_block_out_channels beside an AutoencoderKL; allowed"):
        build_autoencoder(load_config(tmp_path / "a.yaml", more).model)


def test_enlargement_starts_from_the_image_with_asymmetric_widths(tmp_path):
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\ndata: {{train: x}}\n")
    more = ["kind=AutoencoderKLFlux2", "block_out_channels=[32,48]", "decoder_block_out_channels=[24,40]"]
    config = load_config(
        tmp_path / "a.yaml", [f"model.{m}" for m in (*more, "norm_num_groups=4", "start=enlargement")]
    )
    x = torch.nn.functional.interpolate(images(8, 8, 1), scale_factor=8, mode="bilinear")
    with torch.no_grad():
        assert (build_autoencoder(config.model).eval()(x).sample - x).abs().mean() < 0.1
