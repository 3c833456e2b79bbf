"""Moments against numpy and scipy, spectra of fields with a known one, studies of models with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from kl_autoencoder.evaluation import latent_probes
from kl_autoencoder.evaluation.latent_statistics import LOGVAR_EDGES, LatentSums, SpectrumSum
from kl_autoencoder.networks.distributions import DiagonalGaussian


def posteriors():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(5, 3, 8, 6)) ** 3 + np.array([0.0, 5.0, -2.0])[:, None, None]
    mean[:, 2] += 2 * mean[:, 0]
    logvar = rng.normal(-4, 3, size=mean.shape)
    return DiagonalGaussian(torch.from_numpy(np.concatenate([mean, logvar], axis=1)))


def test_moments_are_those_of_scipy():
    posterior = posteriors()
    sums = LatentSums(3)
    sums.update(posterior)
    found = sums.summary()
    z = posterior.mean.transpose(0, 1).flatten(1).numpy()
    assert found["mean"] == pytest.approx(z.mean(axis=1))
    assert found["std"] == pytest.approx(z.std(axis=1))
    assert found["kurtosis"] == pytest.approx(scipy.stats.kurtosis(z, axis=1, fisher=False))
    np.testing.assert_allclose(found["correlation"], np.corrcoef(z), atol=1e-12)
    assert found["logvar"] == pytest.approx(posterior.logvar.mean(dim=(0, 2, 3)).tolist())
    assert found["logvar_histogram"]["counts"] == np.histogram(posterior.logvar, LOGVAR_EDGES)[0].tolist()
    assert found["kl"] == pytest.approx(posterior.kl_map().mean(dim=(0, 2, 3)).tolist())
    assert (found["shift_factor"], 1 / found["scaling_factor"]) == pytest.approx((z.mean(), z.std()))


def test_sums_of_parts_are_the_sum_of_all():
    moments = posteriors().parameters
    whole, parts = LatentSums(3), [LatentSums(3), LatentSums(3)]
    whole.update(DiagonalGaussian(moments))
    for part, some in zip(parts, (moments[:2], moments[2:]), strict=True):
        part.update(DiagonalGaussian(some))
    joined, expected = (parts[0] + parts[1]).summary(), whole.summary()
    for key in ("mean", "std", "kurtosis", "kl", "logvar"):
        assert joined[key] == pytest.approx(expected[key], rel=1e-12)
    assert joined["spectrum"]["power"] == pytest.approx(expected["spectrum"]["power"], rel=1e-12)


def test_active_channels_and_images_that_are_not_finite():
    moments = torch.zeros(2, 4, 4, 4)  # exactly the prior: no information
    moments[:, 1] = torch.randn(2, 4, 4)
    moments[1, 0, 0, 0] = float("nan")
    sums = LatentSums(2)
    sums.update(DiagonalGaussian(moments))
    assert sums.count == 16 and sums.summary()["active_channels"] == 1
    empty = LatentSums(2)
    empty.update(DiagonalGaussian(moments[1:]))
    with pytest.raises(ValueError, match="no latents that are finite"):
        empty.summary()


@pytest.mark.parametrize("mixture, dimension", [
    (np.eye(3), 3), (np.diag([2.0, 1.0, 0.0]), 25 / 17), (np.ones((3, 1)) * [[1.0, 0, 0]], 1),
    (np.linalg.qr(np.arange(9.0).reshape(3, 3) ** 2 + 1)[0] @ np.diag([3.0, 3.0, 0.0]), 2),
])  # fmt: skip
def test_the_effective_dimension_counts_independent_directions(mixture, dimension):
    """White noise mixed by a matrix: (4 + 1)^2 / (16 + 1) for deviations of 2 and 1, whatever the rotation."""
    white = np.random.default_rng(0).normal(size=(3, 4, 100, 100))
    mean = torch.from_numpy(np.einsum("ij,jbhw->bihw", mixture, white) + 5.0)
    sums = LatentSums(3)
    sums.update(DiagonalGaussian(torch.cat([mean, torch.zeros_like(mean)], dim=1)))
    assert sums.summary()["effective_dimension"] == pytest.approx(dimension, abs=0.02)


def test_constant_latents_have_no_effective_dimension():
    sums = LatentSums(2)
    sums.update(DiagonalGaussian(torch.zeros(1, 4, 4, 4)))
    assert sums.summary()["effective_dimension"] is None


def spectrum(fields):
    sums = SpectrumSum()
    for field in fields:
        sums.update(torch.from_numpy(field))
    return sums.summary()


def test_the_spectrum_of_white_noise_is_flat():
    found = spectrum(np.random.default_rng(0).normal(3.0, 2.0, size=(40, 2, 64, 48)))
    off = np.abs(np.array(found["power"]) - 1)
    # subtracting the mean under the window takes power from the lowest frequencies
    assert off[:2].max() < 0.25 and off[2:].max() < 0.06 and abs(found["slope"]) < 0.08


def test_a_wave_has_its_power_at_its_frequency():
    x = np.arange(64)
    found = spectrum([np.sin(2 * np.pi * 0.2 * x)[None, None, :] * np.ones((1, 64, 1))])  # 0.4 of Nyquist
    assert found["frequency"][int(np.argmax(found["power"]))] == pytest.approx(0.4, abs=1 / 32)
    assert found["high_frequency_share"] < 0.01


def test_the_slope_of_a_power_law():
    rng, side = np.random.default_rng(0), 128
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    radius[0, 0] = np.inf
    fields = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / radius).real[None] for _ in range(8)]
    assert spectrum(fields)["slope"] == pytest.approx(-2, abs=0.15)


class Averages:
    """An autoencoder that commutes with every flip and turn: means of 8x8 pixels, and their repetition."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images):
        return SimpleNamespace(latent_dist=DiagonalGaussian(F.avg_pool2d(images, 8).repeat(1, 2, 1, 1)))

    def decode(self, z):
        return SimpleNamespace(sample=F.interpolate(z, scale_factor=8, mode="nearest"))


MOMENTS = {"scaling_factor": 4.0, "mean": [0.0] * 3, "std": [0.25] * 3}  # so that a deviation is 0.25


def study_of(images):
    study = latent_probes.Study(Averages(), MOMENTS, lambda a, b: (a - b).abs().mean(), seed=0)
    pairs = [list(enumerate(images))[i : i + 2] for i in range(0, len(images), 2)]
    return latent_probes.summary([study.of_pair(pair) for pair in pairs])


def test_studies_of_a_model_that_commutes_with_flips_and_turns():
    blocks = 0.3 * torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.15
    images = torch.round(blocks.repeat_interleave(8, -1).repeat_interleave(8, -2) * 127.5) / 127.5 - 1 / 255
    found = study_of(list(images))
    for transform in ("flip_horizontal", "flip_vertical", "rotate_90"):
        assert found["equivariance"][transform] == {
            "latent_error": pytest.approx(0, abs=1e-6),
            "image_psnr": 100,
            "image_lpips": pytest.approx(0, abs=1e-6),
        }
    assert found["equivariance"]["downscale_2"]["image_psnr"] < 40
    for sigma, decibels in zip(found["noise"]["sigma"][1:3], found["noise"]["psnr"][1:3], strict=True):
        # of noise of that deviation on pixels from -1 to 1
        expected = 10 * np.log10(2**2 / (0.25 * sigma) ** 2)
        assert decibels == pytest.approx(expected, abs=0.3)
    assert found["noise"]["psnr"][0] == 100 and found["images"] == 4
    # the distance of this study is the mean absolute difference; E|noise| is sqrt(2 / pi) deviations
    for sigma, distance in zip(found["noise"]["sigma"][1:3], found["noise"]["lpips"][1:3], strict=True):
        assert distance == pytest.approx(0.25 * sigma * np.sqrt(2 / np.pi), rel=0.1)
    # equal steps of a line are equal in a linear model
    assert found["path"]["unevenness"] == pytest.approx(1, abs=1e-4) and found["path"]["pairs"] == 2
    assert sum(found["path"]["lpips_of_steps"]) == pytest.approx(found["path"]["lpips_of_ends"], rel=1e-4)


def test_scaled_latents_are_compared_with_the_scaled_image():
    """Flat images have no error at any scale; of a ramp both errors are computed here once more."""
    flat = torch.full((1, 3, 128, 128), 3 / 127.5 - 1)
    found = study_of([flat, flat])["scale"]
    assert found["scale"] == [0.25, 0.375, 0.5, 0.75]
    assert found["psnr"] == found["psnr_encoded"] == [100] * 4
    assert found["lpips"] == pytest.approx([0] * 4, abs=1e-6)
    ramp = torch.linspace(-0.9, 0.9, 128).expand(1, 3, 128, 128)
    found = study_of([ramp, ramp])["scale"]
    for i, scale in enumerate(found["scale"]):
        side = round(128 * scale)
        small = F.interpolate(ramp, (side, side), mode="bicubic", antialias=True)
        z = F.interpolate(F.avg_pool2d(ramp, 8), (side // 8, side // 8), mode="bicubic", antialias=True)
        of_latents, encoded = (
            F.interpolate(latents, scale_factor=8) for latents in (z, F.avg_pool2d(small, 8))
        )
        assert found["lpips"][i] == pytest.approx((of_latents - small).abs().mean().item(), rel=1e-4)
        assert found["lpips_encoded"][i] == pytest.approx((encoded - small).abs().mean().item(), rel=1e-4)
        assert 100 > found["psnr"][i] > 20


def test_scales_that_are_too_small_for_lpips_have_no_lpips():
    found = study_of(list(0.5 * torch.rand(2, 1, 3, 64, 64)))["scale"]
    assert found["lpips"][:2] == [None, None] and found["lpips"][2] > 0 and found["psnr"][0] > 0


def test_a_shift_is_an_error_of_equivariance(monkeypatch):
    centred = Averages.decode
    shifted = lambda model, z: SimpleNamespace(sample=centred(model, z).sample.roll(3, -1))  # noqa: E731
    monkeypatch.setattr(Averages, "decode", shifted)
    images = 0.5 * torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = study_of(list(images))["equivariance"]
    assert found["flip_vertical"]["image_psnr"] == 100 > 40 > found["flip_horizontal"]["image_psnr"]
    assert found["flip_horizontal"]["image_lpips"] > 0.01 > found["flip_vertical"]["image_lpips"] == 0


def test_latents_rounded_to_8_bits():
    z = (
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 9.0, 0.0])[:, None, None]
    )
    rounded = latent_probes.rounded_to_8_bits(z)
    ranges = z.amax(dim=(2, 3)) - z.amin(dim=(2, 3))
    assert ((rounded - z).abs().amax(dim=(2, 3)) <= ranges / 255 / 2 + 1e-6).all()
    assert all(len(channel.unique()) <= 256 for channel in rounded.flatten(0, 1))
    assert (rounded[:, 2] == z[:, 2]).all()
