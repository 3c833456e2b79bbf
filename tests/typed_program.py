"""A user's program with the types that it may count on: `mypy` reads it (see `.ci/run`), nothing runs it."""

from pathlib import Path

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import assert_type

from kl_autoencoder import (
    DiagonalGaussian,
    KLAutoencoder,
    LatentDataset,
    SameShape,
    compress,
    decompress,
    image_size,
    load_image,
    save_image,
)
from train.config import Config, EMAConfig, load_config


def reconstruct(path: Path) -> list[Path]:
    vae = KLAutoencoder.from_pretrained("compact")
    assert_type(vae, KLAutoencoder)
    images = load_image(path)
    assert_type(images, Tensor)
    posterior = DiagonalGaussian(vae.encode(images).latent_dist.parameters)
    latents = vae.scale(posterior.mode())
    assert_type(latents, Tensor)
    assert_type(posterior.kl(), Tensor)
    assert_type(image_size(path), tuple[int, int])
    return save_image(vae.decode(vae.unscale(latents)).sample, "reconstruction.png", size=image_size(path))


def a_diffusers_component(vae: KLAutoencoder) -> AutoencoderKL:
    assert_type(vae.downsampling, int)
    print(vae.config.latent_channels, vae.device, vae.dtype)
    vae.eval().requires_grad_(False)
    return vae


def a_few_kilobytes(path: Path, vae: KLAutoencoder) -> Image:
    data = compress(path, bits_per_pixel=0.1, model=vae)
    assert_type(data, bytes)
    return decompress(data, model=vae)


def latents(vae: KLAutoencoder, folder: str) -> DataLoader[dict[str, Tensor]]:
    dataset = LatentDataset(folder, vae.config)
    dataset.set_epoch(1)
    return DataLoader(dataset, batch_sampler=SameShape(dataset, 16))


def a_run(path: str) -> int:
    config = load_config(path, ["train.steps=200"])
    assert_type(config, Config)
    assert_type(config.optimizer.learning_rate, float)
    return config.train.steps


def a_section() -> EMAConfig:
    return EMAConfig(decay=0.9999)


def what_is_refused(path: Path) -> None:
    compress(path, quality="good")  # type: ignore[arg-type]
    load_image(path, sizes=64)  # type: ignore[call-arg]
    EMAConfig(decays=0.9)  # type: ignore[call-arg]
    a_section().decay = 0.9  # type: ignore[misc]
    DiagonalGaussian(path)  # type: ignore[arg-type]
