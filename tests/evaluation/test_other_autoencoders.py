"""evaluate with other autoencoders of diffusers than AutoencoderKL, beside one of ours in one table."""

import json

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    VQModel,
)

from kl_autoencoder import KLAutoencoder, load_image
from kl_autoencoder.cli.main import main as command
from kl_autoencoder.cli.paths import MODELS, OTHERS
from kl_autoencoder.evaluation.metrics import from_8_bits, psnr, to_8_bits
from tests.models.test_optimized_classes import ASYMMETRIC, LEVELS, NARROW, classes

TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
DC = {
    "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16), "latent_channels": 4,
    "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1), "attention_head_dim": 8, "encoder_qkv_multiscales": ((), ()),
    "decoder_qkv_multiscales": ((), ()),
}  # fmt: skip
CONSISTENCY = {
    "encoder_block_out_channels": (32,) * 4, "encoder_down_block_types": ("DownEncoderBlock2D",) * 4,
    "decoder_block_out_channels": (32,) * 4, "decoder_layers_per_block": 1,
    "encoder_layers_per_block": 1, "encoder_norm_num_groups": 8, "decoder_norm_num_groups": 8,
}  # fmt: skip
MADE = {
    "tiny": lambda: AutoencoderTiny(**TINY),
    "dc": lambda: AutoencoderDC(**DC),
    "vq": lambda: VQModel(**NARROW, **LEVELS),
    "asymmetric": lambda: AsymmetricAutoencoderKL(**LEVELS, **ASYMMETRIC),
    "consistency": lambda: ConsistencyDecoderVAE(**CONSISTENCY),
}


def evaluate(models, photographs, output):
    arguments = [word for model in models for word in ("--model", str(model))]
    more = (
        "--data",
        str(photographs),
        "--size",
        "64",
        "--limit",
        "2",
        "--study-images",
        "1",
        "--device",
        "cpu",
    )
    return command(["evaluate", *arguments, *more, "-o", str(output)])


def test_one_table_of_ours_and_others(photographs, tmp_path):
    torch.manual_seed(0)
    KLAutoencoder(block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "ours")
    for name, make in MADE.items():
        make().save_pretrained(tmp_path / name)
    assert evaluate([tmp_path / name for name in ("ours", *MADE)], photographs, tmp_path / "report") == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert list(metrics["models"]) == ["ours"] and list(metrics["others"]) == list(MADE)
    shapes = {name: (o["downsampling"], o["latent_channels"]) for name, o in metrics["others"].items()}
    assert shapes == {"tiny": (8, 4), "dc": (2, 4), "vq": (2, 3), "asymmetric": (2, 4), "consistency": (8, 4)}
    images = torch.cat([load_image(file, 64) for file in sorted(photographs.iterdir())[:2]])
    vae = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latents).sample
    expected = psnr(from_8_bits(to_8_bits(decoded)), images)
    measured = metrics["results"]["tiny/float32"]["metrics"]
    assert measured["psnr"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-3)
    assert measured["bits_per_pixel"]["mean"] == 8 * 4 / 64


def test_an_evaluation_of_other_autoencoders_alone(photographs, tmp_path):
    AutoencoderTiny(**TINY).save_pretrained(tmp_path / "taesd")
    assert evaluate([tmp_path / "taesd"], photographs, tmp_path / "report") == 0
    assert "AutoencoderTiny" in (tmp_path / "report" / "report.html").read_text()


def test_models_of_videos_are_refused(photographs, tmp_path, capsys):
    video = AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,))
    video.save_pretrained(tmp_path / "video")
    assert evaluate([tmp_path / "video"], photographs, tmp_path / "report") != 0
    assert "holds a AutoencoderKLTemporalDecoder, expected an AutoencoderKL or" in capsys.readouterr().err


def test_the_others_are_classes_of_diffusers():
    assert {*MODELS, *OTHERS} - {"Autoencoder"} <= {cls.__name__ for cls, _ in classes()}
