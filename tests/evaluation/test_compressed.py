"""Models as codecs in an evaluation, against `compress` itself and against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from kl_autoencoder import compress, decompress
from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.image_io import tensor_to_images
from kl_autoencoder.evaluation.compressed import Compressed
from kl_autoencoder.evaluation.methods import Model
from kl_autoencoder.evaluation.report import html
from kl_autoencoder.evaluation.runner import Evaluation, MetricSuite
from kl_autoencoder.models.autoencoder_kl import KLAutoencoder

QUALITIES = (40, 90)
OTHERS = ["JPEG", "WEBP", *(["AVIF"] if features.check("avif") else [])]


@pytest.fixture(scope="module")
def model(two_models):
    return Model("first", KLAutoencoder.from_pretrained(two_models / "first" / "export"), seed=0)


@pytest.fixture(scope="module")
def pictures(photographs):
    return Photographs.open(str(photographs), 64, "image", "validation", 2)


def test_images_and_bytes_are_those_of_the_files(model, pictures):
    method = Compressed(model, QUALITIES)
    images = torch.cat([pictures[i].image for i in range(2)])
    found = {reproduction.row.key: reproduction for reproduction in method.reproduce(images, [0, 1])}
    assert list(found) == [row.key for row in method.rows] and len(found) == 2 * (1 + len(OTHERS))
    for quality in QUALITIES:
        own = found[f"first/codec/q{quality}"]
        for i, image in enumerate(images):
            data = compress(image, quality, model=model.vae)
            expected = np.asarray(decompress(data, model.vae))
            assert (np.asarray(tensor_to_images(own.images)[i]) == expected).all()
            assert own.extras["bits_per_pixel"][i] == 8 * len(data) / 64**2
            for kind in OTHERS:
                other = found[f"{kind.lower()}/first/q{quality}"]
                file = io.BytesIO()
                tensor_to_images(image[None])[0].save(file, kind, quality=0 if kind != "JPEG" else 1)
                most = max(len(data), len(file.getvalue()))
                assert other.extras["bits_per_pixel"][i] <= 8 * most / 64**2
                assert tensor_to_images(other.images)[i].size == (64, 64)


def test_the_report_draws_quality_over_rate(model, pictures):
    suite = MetricSuite(None, {}, ["no LPIPS"], {}, torch.device("cpu"))
    evaluation = Evaluation(pictures, [model, Compressed(model, QUALITIES)], suite)
    evaluation.measure(2)
    results = evaluation.results()
    rates = [results[f"first/codec/q{quality}"]["metrics"]["bits_per_pixel"]["mean"] for quality in QUALITIES]
    assert rates[0] < rates[1] < 24
    metrics = {"results": results, "latents": {"first": {}}}
    drawn = html._rate_plots(metrics, {"first": "#123456"})
    assert list(drawn) == ["rate_psnr"]  # 64 pixels are too few for MS-SSIM, and there is no LPIPS
    names = ["first, compressed", "JPEG", "WebP", *(["AVIF"] if "AVIF" in OTHERS else [])]
    assert all(f">{name}</text>" in drawn["rate_psnr"] for name in names)
    assert "#123456" in drawn["rate_psnr"]
    shown = {row.key for method in html._shown_methods(evaluation) for row in method.rows}
    assert {row.key for row in evaluation.rows} - shown == {
        row.key for row in evaluation.rows if row.key.endswith("q90")
    }


def test_the_command_refuses_what_has_no_codec(five_photos, tmp_path, capsys):
    from diffusers import AutoencoderTiny

    from kl_autoencoder.cli.main import main

    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    command = ["evaluate", "--model", str(tmp_path / "tiny"), "--data", str(five_photos)]
    assert main([*command, "-o", str(tmp_path / "report"), "--codec"]) != 0
    assert "--codec: none of the models has one" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "report"), "--codec", "101"]) != 0
    assert "must be from 1 to 100, not 101" in capsys.readouterr().err


def test_files_of_pillow_are_what_is_decoded():
    """AVIF, which the other tests of baselines leave out: the highest quality that fits, and its pixels."""
    if "AVIF" not in OTHERS:
        pytest.skip("this Pillow has no AVIF")
    from skimage import data

    from kl_autoencoder.evaluation import baselines

    picture = Image.fromarray(data.astronaut()[100:148, 180:228])
    images = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    decoded, (size,) = baselines.codec(images, "AVIF", 900)
    files = {}
    for quality in range(0, 101, 4):
        file = io.BytesIO()
        picture.save(file, "AVIF", quality=quality)
        files[quality] = file.getvalue()
    assert max(len(file) for file in files.values() if len(file) <= 900) <= size <= 900
    assert decoded.shape == images.shape and (decoded - images).abs().mean() < 0.2
