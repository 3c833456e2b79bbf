"""The measures of a whole model: of linear ones, whose numbers are known, and of codes."""

import math
from types import SimpleNamespace

import pytest
import torch

from kl_autoencoder.evaluation.variational import measures
from kl_autoencoder.evaluation.variational.linear_gaussian import probabilistic_pca
from kl_autoencoder.evaluation.variational.measures import Images, encode, measure
from tests.evaluation.variational.linear import LinearModel, true_posterior


def images(n=120, d=6):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing)[..., None, None]


def test_the_measures_of_the_best_linear_model(monkeypatch):
    monkeypatch.setattr(measures, "PIXELS_AT_ONCE", 50)
    x = images()
    exact = probabilistic_pca(x.flatten(1), 2)
    model, data, counted = true_posterior(exact), Images(x), []
    encoded = encode(model, data)
    found = measure(model, data, encoded, "gaussian", done=counted.append)
    assert counted == [50, 50, 20]
    best = float(exact.log_likelihood(x.flatten(1)).mean())
    assert math.isclose(found["elbo"], best, abs_tol=0.05) and math.isclose(
        found["iwae_50"], best, abs_tol=0.05
    )
    assert math.isclose(found["log_scale"], 0.5 * math.log(exact.variance), abs_tol=0.05)
    assert math.isclose(found["distortion"] + found["rate"], -found["elbo"], rel_tol=1e-9)
    assert (found["images"], found["active_units"], found["units"]) == (120, 2, 2)
    rate = found["mutual_information"] + found["aggregate_kl"]
    assert math.isclose(rate, found["rate"], abs_tol=0.5)
    assert 0 < found["mutual_information"] <= math.log(120)


class Codes:
    """A 'model' with the code book 0 .. 7 and one code an image, the rounded mean of its values times 8."""

    codes, is_discrete, device, config = 8, True, torch.device("cpu"), {"bottleneck": {"kind": "vq"}}

    def encode_indices(self, images):
        return (images.mean((1, 2, 3)) * 8).round().long()[:, None, None]

    def encode(self, images):
        z = self.encode_indices(images)[:, None].float() / 8
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z):
        return SimpleNamespace(sample=z.expand(-1, 1, 4, 4))


def test_the_measures_of_codes():
    x = (torch.tensor([1.0, 3, 5, 5]).repeat(10) / 8)[:, None, None, None].expand(-1, 1, 4, 4) + 0.01
    data = Images(x)
    found = measure(Codes(), data, encode(Codes(), data), "gaussian")
    assert found["images"] == 40 and math.isclose(found["mse"], 1e-4, rel_tol=1e-3)
    assert found["codes"] == 8 and found["usage"] == 3 / 8
    assert math.isclose(found["perplexity"], 2**1.5, rel_tol=1e-9)
    assert "elbo" not in found


@pytest.mark.parametrize("prior", [None, "mixture"])
def test_the_measures_of_latents_without_a_density(prior):
    """Latents that are draws of N(0, I): near that prior, far from another."""

    class Plain(LinearModel):
        def encode(self, images):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))

    x = torch.randn(800, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    eye = torch.eye(2)
    data, model = Images(x), Plain(eye, torch.zeros(2), torch.ones(2), eye, torch.zeros(2))
    model.config = {"bottleneck": {"kind": "adversarial", "prior": prior} if prior else {"kind": "none"}}
    found = measure(model, data, encode(model, data), "gaussian")
    assert found["mse"] == 0 and found["prior"] == (prior or "normal")
    assert found["mmd"] > 4e-3 if prior else abs(found["mmd"]) < 2e-3
