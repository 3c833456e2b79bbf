"""The models in the package: they are there, anyone can load them, and they reconstruct."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.codec.context_model import ContextModel
from kl_autoencoder.data.image_io import load_image, pad_to_multiple, tensor_to_images
from kl_autoencoder.evaluation.metrics import LPIPS
from kl_autoencoder.latents.latent_files import load_latents
from kl_autoencoder.models.packaged import COMPACT, PACKAGED, packaged
from tests.conftest import backbone_missing
from train.autoencoder.model import build_autoencoder
from train.config import ModelConfig

FILES = {"config.json", "diffusion_pytorch_model.safetensors", "entropy_model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def vae():
    return KLAutoencoder.from_pretrained("compact")


@pytest.fixture(scope="module")
def astronaut():
    return load_image(Image.fromarray(data.astronaut()))


@pytest.fixture(scope="module")
def reconstruction(vae, astronaut):
    with torch.inference_mode():
        return vae(astronaut).sample


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photograph in the working directory; connecting to a network is an error."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.chelsea()[:90, :101]).save("photo.png")
    return tmp_path / "photo.png"


def bicubic(images):
    """Down by 8 and up again with Pillow, which filters as it shrinks."""
    image = tensor_to_images(images)[0]
    small = image.resize((image.width // 8, image.height // 8), Image.Resampling.BICUBIC)
    return load_image(small.resize(image.size, Image.Resampling.BICUBIC))


def pixels(images):
    return np.asarray(tensor_to_images(images)[0])


@pytest.mark.parametrize("name", PACKAGED)
def test_plain_diffusers_loads_it_and_agrees(name, astronaut):
    plain, info = AutoencoderKL.from_pretrained(PACKAGED[name], output_loading_info=True)
    vae = KLAutoencoder.from_pretrained(name)
    assert type(plain) is AutoencoderKL and not info["missing_keys"] and not info["unexpected_keys"]
    assert plain.dtype == vae.dtype == torch.float32
    crop = astronaut[..., :128, 100:228]
    with torch.inference_mode():
        torch.testing.assert_close(vae(crop).sample, plain(crop).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "channels"), [("compact", 4), ("compact-codec", 16)])
def test_it_is_small_f8_and_stored_in_half_precision(name, channels):
    weights = PACKAGED[name] / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert weights.stat().st_size < 20e6
    vae = KLAutoencoder.from_pretrained(name)
    assert vae.downsampling == 8 and vae.config.latent_channels == channels
    assert ContextModel.beside(PACKAGED[name]).channels == channels


def test_it_is_better_than_bicubic(astronaut, reconstruction):
    found, simple = (pixels(x) for x in (reconstruction, bicubic(astronaut)))
    psnr = peak_signal_noise_ratio(data.astronaut(), found)
    assert psnr > peak_signal_noise_ratio(data.astronaut(), simple) + 0.5
    assert psnr > 25


@pytest.mark.skipif(backbone_missing("alex"), reason="the LPIPS backbone alex is not in TORCH_HOME")
def test_it_looks_better_than_bicubic(astronaut, reconstruction):
    lpips = LPIPS("alex")
    with torch.inference_mode():
        found, simple = (lpips(x.clamp(-1, 1), astronaut) for x in (reconstruction, bicubic(astronaut)))
    assert found < simple - 0.3


def test_its_quality_does_not_depend_on_the_size(vae, astronaut, reconstruction):
    """The same part of the photograph, with and without the rest around it."""
    part = (..., slice(128, 384), slice(128, 384))
    with torch.inference_mode():
        alone = vae(astronaut[part]).sample
    inner = (..., slice(48, -48), slice(48, -48))
    assert (alone[inner] - reconstruction[part][inner]).square().mean() < 1e-3


@pytest.mark.parametrize(
    "colour", [(-1, -1, -1), (0, 0, 0), (0.9, 0.9, 0.9), (0.6, -0.3, -0.3), (-0.4, 0, 0.6)]
)
def test_flat_colours_stay_flat(vae, colour):
    """No grid and no shift, away from the border: within a quarter of a level of 8 bits, and 2.6 levels."""
    image = torch.tensor(colour).float().view(1, 3, 1, 1).expand(1, 3, 192, 192)
    with torch.inference_mode():
        inner = vae(image).sample[..., 64:-64, 64:-64]
    assert inner.std(dim=(2, 3)).max() < 2e-3
    assert (inner - image[..., 64:-64, 64:-64]).mean(dim=(2, 3)).abs().max() < 0.02


def test_its_latents_are_scaled_to_unit_deviation(vae, astronaut):
    with torch.inference_mode():
        latents = vae.scale(vae.encode(astronaut).latent_dist.mode())
    assert 0.6 < latents.std() < 1.6


def test_the_command_line_uses_it_without_being_told(photo, vae):
    assert main(["reconstruct", str(photo), "-o", "out.png"]) == 0
    assert main(["encode", str(photo), "-o", "latents.safetensors"]) == 0
    assert main(["decode", "latents.safetensors", "-o", "decoded.png"]) == 0
    with torch.inference_mode():
        images = pad_to_multiple(load_image(photo, multiple_of=1), 8)
        wanted = pixels(vae(images).sample[..., :90, :101])
    for name in ("out.png", "decoded.png"):
        assert np.abs(wanted.astype(int) - np.asarray(Image.open(name))).max() <= 1
    assert load_latents("latents.safetensors").model == "compact"


def test_info_and_export_know_it(photo, capsys):
    assert main(["info", "compact"]) == 0 and "float16" in capsys.readouterr().out
    assert main(["export", "compact", "-o", "copy"]) == 0
    assert (photo.parent / "copy" / "README.md").read_text() == (COMPACT / "README.md").read_text()


def test_names_of_packaged_models_are_looked_up_behind_folders(photo):
    assert packaged("compact") == packaged(Path("compact")) == COMPACT
    (photo.parent / "compact").write_bytes(b"a file")
    assert packaged("compact") == COMPACT and packaged("me/compact") == "me/compact"
    (photo.parent / "compact").unlink()
    (photo.parent / "compact").mkdir()
    assert packaged("compact") == "compact"


def test_a_local_folder_of_that_name_goes_first(photo):
    torch.manual_seed(0)
    KLAutoencoder(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3).save_pretrained("compact")
    assert KLAutoencoder.from_pretrained("compact").config.latent_channels == 3
    assert main(["encode", str(photo), "-o", "latents.safetensors"]) == 0
    assert load_latents("latents.safetensors").raw()[0].shape[0] == 3


def test_training_can_go_on_from_it(vae, photo):
    again = build_autoencoder(ModelConfig(pretrained="compact"))
    torch.testing.assert_close(again.state_dict(), vae.state_dict(), rtol=0, atol=0)
