"""The first weights: `start: enlargement`; more latent channels change no image, fewer are principal components."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder, KLAutoencoderFlux2
from kl_autoencoder.data.image_io import image_to_tensor
from kl_autoencoder.evaluation.metrics import psnr
from tests.train.runs import make, small_config
from train.autoencoder.model import build_autoencoder
from train.autoencoder.start import keep_principal_latents
from train.config import AutoencoderConfig, ModelConfig, build


def enlargement(widths=(16, 32, 48, 64), groups=2, **more):
    torch.manual_seed(0)
    config = {"block_out_channels": widths, "norm_num_groups": groups, "start": "enlargement", **more}
    return build_autoencoder(ModelConfig(**config)).eval()


@pytest.fixture(scope="module")
def astronaut():
    return image_to_tensor(Image.fromarray(data.astronaut()[:256, 128:384]))[None]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"groups": 4},
        {"layers_per_block": 2, "latent_channels": 8},
        {"use_quant_conv": False},
        {"widths": (16, 16)},
    ],
)
def test_a_new_network_averages_and_enlarges_bilinearly(more, astronaut):
    vae = enlargement(**more)
    wanted = F.avg_pool2d(astronaut, vae.downsampling)
    for _ in vae.config.block_out_channels[1:]:
        wanted = F.interpolate(wanted, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        found = vae(astronaut).sample
    inner = slice(16, -16)  # convolutions see zeros beyond the border
    assert psnr(found[..., inner, inner], wanted[..., inner, inner]) > 28
    assert psnr(found, astronaut) > psnr(wanted, astronaut) - 2


def test_the_latents_of_an_enlargement_are_the_colours_of_blocks(astronaut):
    """Three channels of about unit deviation, with little noise; the others small."""
    with torch.no_grad():
        posterior = enlargement().encode(astronaut).latent_dist
    blocks = F.avg_pool2d(astronaut, 8)
    for channel, colour in ((0, blocks.mean(1)), (1, blocks[:, 0] - blocks[:, 2])):
        pair = torch.stack([posterior.mean[:, channel].flatten(), colour.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99
        assert 0.3 < pair[0].std() < 3
    assert posterior.std.max() < 0.06


def test_every_weight_learns(astronaut):
    """From the second step on: in the first, convolutions that begin at zero hold back the gradients of others."""
    vae = enlargement().train()
    optimizer = torch.optim.SGD(vae.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        output = vae(astronaut, sample_posterior=True)
        ((output.sample - astronaut).abs().mean() + 1e-6 * output.latent_dist.kl().mean()).backward()
        optimizer.step()
    still = [name for name, p in vae.named_parameters() if not p.grad.abs().max() > 0]
    assert still == []


def test_networks_too_narrow_for_enlargement_are_refused():
    for more in ({"groups": 8}, {"latent_channels": 2}, {"widths": (4, 8), "groups": 1}):
        with pytest.raises(
            ValueError, match=r"start: enlargement with block_out_channels=.*allowed: 3 latent"
        ):
            enlargement(**more)


def test_a_pretrained_model_brings_its_own_weights():
    with pytest.raises(ValueError, match="start"):
        ModelConfig(pretrained="folder", start="enlargement")


@pytest.mark.parametrize("convolutions", [True, False])
def test_more_latent_channels_change_no_image_but_learn(convolutions, astronaut, tmp_path):
    torch.manual_seed(0)
    vae = KLAutoencoder(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, latents_mean=(0.0,) * 3,
        latents_std=(2.0,) * 3, scaling_factor=0.5, use_quant_conv=convolutions, use_post_quant_conv=convolutions,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path)
    wider = build_autoencoder(ModelConfig(pretrained=str(tmp_path), latent_channels=5)).eval()
    config = wider.config
    assert (config.latent_channels, config.scaling_factor, config.latents_std) == (5, 0.5, None)
    images = astronaut[..., :64, :64]
    old, new = (model.encode(images).latent_dist for model in (vae, wider))
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(new, name)[:, :3], getattr(old, name))
    torch.testing.assert_close(wider(images).sample, vae(images).sample)
    deviations = new.mean.std(dim=(0, 2, 3))
    assert deviations[3:].min() > 0.5 * deviations[:3].min() > 0
    wider(images).sample.square().mean().backward()
    assert wider.decoder.conv_in.weight.grad[:, 3:].abs().max() > 0


@pytest.mark.parametrize("convolutions", [True, False])
def test_fewer_latent_channels_are_principal_components(convolutions, astronaut):
    """Against the singular value decomposition; the decoder gets the projected latents, except at the border."""
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, "use_quant_conv": convolutions,
               "use_post_quant_conv": convolutions, "mid_block_add_attention": False}  # fmt: skip
    vae = KLAutoencoder(latent_channels=5, **options).eval()
    z = vae.encode(astronaut).latent_dist.mode().detach()
    latents = z.movedim(1, -1).flatten(0, 2)
    narrower = keep_principal_latents(vae, KLAutoencoder(latent_channels=2, **options).eval(), latents)

    mean = latents.mean(0)
    axes = torch.linalg.svd(latents - mean, full_matrices=False).Vh[:2]
    found = narrower.encode(astronaut).latent_dist.mode().movedim(1, -1).flatten(0, 2)
    wanted = (latents - mean) @ axes.T
    deviation = latents.var(0).mean().sqrt()
    wanted = wanted / wanted.std(0) * deviation
    torch.testing.assert_close(found * (found * wanted).mean(0).sign(), wanted, rtol=1e-3, atol=1e-4)
    projected = (mean + (latents - mean) @ axes.T @ axes).unflatten(0, z[:, 0].shape).movedim(-1, 1)
    first, wanted = (
        model.decoder.conv_in(model.post_quant_conv(z) if convolutions else z)[..., 1:-1, 1:-1]
        for model, z in ((narrower, narrower.encode(astronaut).latent_dist.mode()), (vae, projected))
    )
    torch.testing.assert_close(first, wanted, rtol=1e-3, atol=1e-4)


def test_a_run_keeps_the_principal_latents_of_its_images(photographs, tmp_path):
    """The latents of its first crops are uncorrelated, and have one deviation; those of compact are neither."""
    model = {
        "block_out_channels": None,
        "norm_num_groups": None,
        "pretrained": "compact",
        "latent_channels": 3,
    }
    trainer = make(small_config(photographs, tmp_path, model=model))
    batches = islice(trainer.task.data.loader(), 16)
    latents = [trainer.task.vae.encode(batch["images"]).latent_dist.mean for batch in batches]
    covariance = torch.cov(torch.cat(latents).detach().movedim(1, 0).flatten(1))
    torch.testing.assert_close(covariance / covariance[0, 0], torch.eye(3), rtol=0, atol=0.02)
    trainer.fit()
    assert KLAutoencoder.from_pretrained(tmp_path / "export").config.latent_channels == 3


def test_fewer_latent_channels_and_those_of_another_class_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="model.latent_channels: 3 beside AutoencoderKL with 4; allowed: 4 to 32"
    ):
        build_autoencoder(ModelConfig(pretrained="compact", latent_channels=3))
    with pytest.raises(
        ValueError, match="model.latent_channels: 8 beside model.pretrained with train.decoder_only"
    ):
        values = {"model": {"pretrained": "compact", "latent_channels": 8}, "train": {"decoder_only": True}}
        build(AutoencoderConfig, {"output_dir": "x", "data": {"train": "x"}} | values)
    KLAutoencoderFlux2(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="model.latent_channels: 4 beside AutoencoderKLFlux2"):
        build_autoencoder(ModelConfig(pretrained=str(tmp_path), latent_channels=4))
