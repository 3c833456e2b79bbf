"""Interpolation, fitted Gaussians, attributes and anomalies, where the answer is known."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import geometric_slerp
from scipy.stats import mannwhitneyu
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_io import load_image
from kl_autoencoder.evaluation.anomaly import Detector, largest_mean, patches, roc
from kl_autoencoder.latents.interpolation import fitted, interpolate, mean_latent, slerp, standard_normal
from kl_autoencoder.networks.distributions import DiagonalGaussian


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestInterpolation:
    def test_linear(self):
        a, b = draws(2, 4, 5, 6)
        way = interpolate(a, b, 5)
        assert torch.equal(way[0], a) and torch.equal(way[-1], b)
        assert torch.allclose(way[1:4], torch.stack([a + (b - a) * t for t in (0.25, 0.5, 0.75)]), atol=1e-6)

    def test_spherical_equals_scipy(self):
        a, b = draws(2, 4, 3, 3).double()
        a, b = a / a.norm(), b / b.norm()
        way = interpolate(a, b, 6, spherical=True)
        wanted = geometric_slerp(a.flatten().numpy(), b.flatten().numpy(), np.linspace(0, 1, 6))
        np.testing.assert_allclose(way.flatten(1).numpy(), wanted, atol=1e-12)

    def test_the_norm_of_draws_is_kept(self):
        a, b = draws(2, 4, 64, 64)
        assert slerp(a, b, 0.5).norm() == pytest.approx(float(a.norm()), rel=0.02)
        assert torch.lerp(a, b, 0.5).norm() == pytest.approx(float(a.norm()) / math.sqrt(2), rel=0.02)

    @pytest.mark.parametrize("factor", [1.0, 2.0, 0.0, -1.0])
    def test_slerp_of_parallel_opposite_and_zero_latents(self, factor):
        a = draws(4, 3, 3)
        assert (
            torch.allclose(slerp(a, factor * a, 0.25), torch.lerp(a, factor * a, 0.25), atol=1e-4)
            or factor < 0
        )
        assert slerp(a, factor * a, 0.25).isfinite().all()

    def test_impossible(self):
        with pytest.raises(ValueError, match="steps: 1"):
            interpolate(draws(1, 2, 2), draws(1, 2, 2), 1)
        with pytest.raises(ValueError, match="one shape"):
            interpolate(draws(1, 2, 2), draws(1, 2, 3), 3)


class TestGaussians:
    def posteriors(self):
        moments = draws(6, 1, 8, 3, 5).double()
        return [DiagonalGaussian(torch.cat([2 * m[:, :4] + 1, m[:, 4:]], 1)) for m in moments]

    @pytest.mark.parametrize("per, over", [("channel", (0, 2, 3)), ("position", (0,))])
    def test_fitted_has_the_mean_and_variance_of_all_draws(self, per, over):
        found = self.posteriors()
        mean, var = torch.cat([p.mean for p in found]).numpy(), torch.cat([p.var for p in found]).numpy()
        gaussian = fitted(found, per)
        wanted_mean, wanted_var = (
            mean.mean(over, keepdims=True),
            mean.var(over, keepdims=True) + var.mean(over, keepdims=True),
        )
        np.testing.assert_allclose(gaussian.mean, np.broadcast_to(wanted_mean, (1, 4, 3, 5)), rtol=1e-5)
        np.testing.assert_allclose(gaussian.var, np.broadcast_to(wanted_var, (1, 4, 3, 5)), rtol=1e-5)

    def test_the_prior(self):
        assert standard_normal(4, 3, 5).kl() == 0 and standard_normal(4, 3, 5).mean.shape == (1, 4, 3, 5)

    def test_attribute_of_shifted_latents_is_the_shift(self):
        found, shift = self.posteriors(), draws(1, 4, 3, 5, seed=1)
        shifted = [DiagonalGaussian(torch.cat([p.mean + shift, p.logvar], 1)) for p in found]
        assert torch.allclose(mean_latent(shifted) - mean_latent(found), shift, atol=1e-5)

    def test_impossible(self):
        with pytest.raises(ValueError, match="no latents"):
            fitted([])
        with pytest.raises(ValueError, match="different shapes"):
            fitted([standard_normal(4, 2, 2), standard_normal(4, 2, 3)])


class TestROC:
    def test_equals_mann_whitney_with_ties(self):
        rng = np.random.default_rng(0)
        scores, strange = rng.integers(0, 10, 200), rng.random(200) < 0.3
        scores = scores + 2 * strange
        fpr, tpr, area = roc(scores, strange)
        u = mannwhitneyu(scores[strange], scores[~strange]).statistic
        assert area == pytest.approx(u / strange.sum() / (~strange).sum())
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and len(fpr) <= 13

    def test_one_kind_alone(self):
        with pytest.raises(ValueError, match="labels: all are 1"):
            roc(np.arange(3), np.ones(3))


def test_the_largest_window():
    values = draws(2, 1, 9, 12).double()
    wanted = [max(v[0, y : y + 3, x : x + 3].mean() for y in range(7) for x in range(10)) for v in values]
    assert torch.allclose(largest_mean(values, 3), torch.stack(wanted))
    assert torch.allclose(largest_mean(values, 99), values.mean((1, 2, 3)))


@pytest.fixture(scope="module")
def trained():
    """A small network after some seconds of training on tiles of one photograph."""
    torch.manual_seed(0)
    vae = KLAutoencoder(
        block_out_channels=(16, 16), norm_num_groups=4, sample_size=48, mid_block_add_attention=False
    )
    optimizer, photo = torch.optim.Adam(vae.parameters(), 3e-3), tiles(48, 32, seed=1)
    for step in range(40):
        batch = photo[torch.randint(len(photo), (8,), generator=torch.Generator().manual_seed(step))]
        output = vae(batch, sample_posterior=True)
        loss = (output.sample - batch).square().mean() + 1e-5 * output.latent_dist.kl().mean() / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.eval().requires_grad_(False)


def tiles(count, side, seed):
    """(count, 3, side, side) of the colour photographs in scikit-image."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        photo = getattr(data, ("astronaut", "chelsea", "coffee")[i % 3])()
        y, x = (rng.integers(0, length - side) for length in photo.shape[:2])
        found.append(load_image(Image.fromarray(photo[y : y + side, x : x + side])))
    return torch.cat(found)


def pasted(images, side, seed=0):
    """Each with a square of noise somewhere."""
    images, rng = images.clone(), np.random.default_rng(seed)
    for image in images:
        y, x = rng.integers(0, images.shape[-1] - side, 2)
        image[:, y : y + side, x : x + side] = torch.from_numpy(rng.uniform(-1, 1, (3, side, side)))
    return images


class TestAnomalies:
    @pytest.fixture(scope="class")
    def detector(self, trained):
        reference = tiles(60, 48, seed=2)
        return Detector(trained, reference[::2].split(1), reference[1::2].split(1))

    @pytest.fixture(scope="class")
    def ordinary(self, detector):
        return [detector.scores(one) for one in tiles(40, 48, seed=3).split(1)]

    def areas(self, detector, ordinary, images):
        both = ordinary + [detector.scores(one) for one in images.split(1)]
        strange = np.arange(len(both)) >= len(ordinary)
        return {name: roc([scores[name] for scores in both], strange)[2] for name in ordinary[0]}

    def test_noise(self, detector, ordinary):
        noise = torch.rand(20, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        areas = self.areas(detector, ordinary, noise)
        assert min(areas["error"], areas["bound"], areas["local"]) > 0.95

    def test_a_square_of_noise_is_found_by_the_local_score_alone(self, detector, ordinary):
        areas = self.areas(detector, ordinary, pasted(tiles(40, 48, seed=4), 12))
        assert areas["local"] > 0.95 > max(areas["error"], areas["kl"], areas["bound"])

    def test_scores_are_what_they_say(self, detector, trained):
        x = tiles(1, 48, seed=5)
        posterior = trained.encode(x).latent_dist
        residual = (x - trained.decode(posterior.mode()).sample).numpy().astype(np.float64)
        kl = float(posterior.kl()) / x.numel()
        s2 = detector.variance
        scores = detector.scores(x)
        assert scores["error"] == pytest.approx((residual**2).mean(), rel=1e-6)
        assert scores["kl"] == pytest.approx(abs(kl - detector.usual_kl), rel=1e-5)
        nll = -torch.distributions.Normal(0, s2**0.5).log_prob(torch.from_numpy(residual)).mean()
        assert scores["bound"] == pytest.approx(float(nll) + kl, rel=1e-6)

    def test_whitened_errors_of_the_reference_are_white(self, detector):
        reference = torch.cat([detector.residual_and_kl(x)[0] for x in tiles(60, 48, seed=2)[::2].split(1)])
        white = patches(reference).flatten(0, 1) @ detector.whitening.T
        covariance = white.T @ white / len(white)
        assert (covariance.diagonal() <= 1 + 1e-9).all() and covariance.diagonal().mean() > 0.8
        assert (covariance - covariance.diagonal().diag()).abs().max() < 0.5

    def test_p_values(self, detector):
        n = len(detector.reference["error"])
        assert detector.p_value("error", -1.0) == 1 and detector.p_value("error", 1e9) == 1 / (n + 1)
        median = float(np.median(detector.reference["error"]))
        assert detector.p_value("error", median) == pytest.approx(0.5, abs=0.02)

    def test_too_few(self, trained):
        with pytest.raises(ValueError, match="no reference"):
            Detector(trained, [], [])


class TestCommands:
    @pytest.fixture
    def files(self, tmp_path, trained, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trained.save_pretrained("vae")
        for folder, images in (("reference", tiles(16, 48, 6)), ("data", tiles(8, 48, 7))):
            (tmp_path / folder).mkdir()
            for i, image in enumerate(images):
                picture = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
                picture.save(tmp_path / folder / f"{i}.png")
        Image.fromarray(data.coffee()[:61, :75]).save("a.png")
        Image.fromarray(data.chelsea()[:80, :90]).save("b.png")
        return tmp_path

    @pytest.mark.parametrize("more", [(), ("--spherical",), ("--size", "32")])
    def test_the_ends_of_a_strip_are_the_reconstructions(self, files, more):
        assert (
            main(
                ["interpolate", "a.png", "b.png", "--model", "vae", "--steps", "4", "-o", "strip.png", *more]
            )
            == 0
        )
        strip = np.asarray(Image.open("strip.png"))
        height, width = (32, 32) if "--size" in more else (61, 75)
        assert strip.shape[1] == 4 * (width + 4) - 4
        Image.fromarray(to_bytes(load_image("b.png", (height, width), 1))).save("b-cropped.png")
        Image.fromarray(to_bytes(load_image("a.png", (height, width), 1))).save("a-cropped.png")
        for name, cell in (("a", strip[-height:, :width]), ("b", strip[-height:, -width:])):
            assert (
                main(["reconstruct", f"{name}-cropped.png", "--model", "vae", "-o", f"{name}-out.png"]) == 0
            )
            assert np.array_equal(np.asarray(Image.open(f"{name}-out.png")), cell)

    def test_sample(self, files):
        assert main(["sample", "vae", "--size", "32", "--grid", "3", "-o", "prior.png"]) == 0
        for per in ("channel", "position"):
            given = ["--size", "32", "--grid", "3", "--fit", per, "--data", "reference", "-o", f"{per}.png"]
            assert main(["sample", "vae", *given]) == 0
        pictures = [np.asarray(Image.open(f"{name}.png")) for name in ("prior", "channel", "position")]
        assert all(picture.shape == (3 * 36 - 4, 3 * 36 - 4, 3) for picture in pictures)
        assert not np.array_equal(*pictures[:2]) and not np.array_equal(*pictures[1:])
        assert main(["sample", "vae", "--fit", "channel", "-o", "none.png"]) == 2

    def test_attribute_of_a_set_and_itself_is_nothing(self, files):
        both = ["--plus", "reference", "--minus", "reference", "--strength", "0", "3"]
        assert main(["attribute", "a.png", *both, "--model", "vae", "--size", "32", "-o", "strip.png"]) == 0
        strip = np.asarray(Image.open("strip.png"))
        assert np.array_equal(strip[-32:, :32], strip[-32:, -32:])
        other = ["--plus", "reference", "--minus", "data", "--strength", "0", "3", "--overwrite"]
        assert main(["attribute", "a.png", *other, "--model", "vae", "--size", "32", "-o", "strip.png"]) == 0
        changed = np.asarray(Image.open("strip.png"))
        assert np.array_equal(changed[-32:, :32], strip[-32:, :32])
        assert not np.array_equal(changed[-32:, -32:], strip[-32:, -32:])

    def test_anomaly(self, files, capsys):
        for i in (1, 5, 6):
            rng = np.random.default_rng(i)
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(
                files / "data" / f"{i}.png"
            )
        (files / "labels.csv").write_text("".join(f"{i}.png,{int(i in (1, 5, 6))}\n" for i in range(8)))
        given = ["vae", "--reference", "reference", "--data", "data", "-o", "scores.csv"]
        assert main(["anomaly", *given]) == 0
        assert "stranger than 95% of the reference" in capsys.readouterr().out
        assert main(["anomaly", *given, "--labels", "labels.csv", "--overwrite"]) == 0
        assert "local   ROC AUC 1.000, 100% found" in capsys.readouterr().out
        rows = list(csv.DictReader((files / "scores.csv").read_text().splitlines()))
        assert [row["name"] for row in rows] == [f"{i}.png" for i in range(8)]
        strangest = sorted(rows, key=lambda row: -float(row["local"]))[:3]
        assert {row["name"] for row in strangest} == {"1.png", "5.png", "6.png"}
        points = list(csv.DictReader((files / "scores.roc.csv").read_text().splitlines()))
        assert {point["score"] for point in points} == {"error", "kl", "bound", "local"}
        (files / "labels.csv").write_text("0.png,strange\n")
        assert main(["anomaly", *given, "--labels", "labels.csv", "--overwrite"]) == 2
        assert "allowed: lines of name,0 or name,1" in capsys.readouterr().err


def to_bytes(images):
    return ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
