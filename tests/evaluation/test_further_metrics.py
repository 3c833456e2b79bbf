"""DISTS and VIF against their formulas and in the report; the error where weights are missing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torchvision.models.vgg import cfgs, make_layers

from kl_autoencoder.cli.commands import evaluate as command
from kl_autoencoder.evaluation.further_metrics import DISTS, FURTHER_METRICS, VIF
from tests.evaluated import evaluate_one

dists_module = pytest.importorskip("torchmetrics.functional.image.dists")


def pair(side=48, seed=0):
    """A smooth image and the same with noise: (2, 3, side, side) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(2, 3, side, side)), 2), 3)
    smooth = torch.from_numpy(smooth / np.abs(smooth).max()).float()
    return (smooth + 0.1 * torch.from_numpy(rng.normal(size=smooth.shape)).float()).clamp(-1, 1), smooth


@pytest.fixture
def random_backbone(monkeypatch):
    """VGG16 with random weights, without its classifier of 500 MB."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=False)
    monkeypatch.setattr(dists_module, "vgg16", lambda weights: SimpleNamespace(features=features))


def test_dists_is_the_mean_of_texture_and_structure_by_the_weights_of_its_authors(random_backbone):
    metric, (images, references) = DISTS(), pair()
    features = [metric.network.forward_once(x[:1] / 2 + 0.5) for x in (images, references)]
    weights = torch.load(dists_module._PATH_WEIGHT_DISTS)
    alpha, beta = (weights[name].flatten().double().numpy() for name in ("alpha", "beta"))
    texture, structure = [], []
    for x, y in zip(*features, strict=True):  # Ding et al. 2020, eqs. 5 and 6
        x, y = (f[0].double().flatten(1).numpy() for f in (x, y))
        mean_x, mean_y = x.mean(1), y.mean(1)
        covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).mean(1)
        texture.append((2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6))
        structure.append((2 * covariance + 1e-6) / (x.var(1) + y.var(1) + 1e-6))
    similarity = alpha @ np.concatenate(texture) + beta @ np.concatenate(structure)
    expected = 1 - similarity / (alpha.sum() + beta.sum())
    found = metric(images, references)
    assert found.shape == (2,) and expected > 1e-3
    assert float(found[0]) == pytest.approx(expected, rel=1e-2)
    assert metric(references, references).abs().max() < 1e-5
    assert metric(images[:1], references[:1]).shape == (1,)
    gray = images[:, :1]
    assert torch.equal(metric(gray, references), metric(gray.expand(-1, 3, -1, -1), references))


def vif(image, reference):
    """Sheikh & Bovik 2006, in the pixel domain, of one channel at 0 to 255."""
    left, all_ = 0.0, 0.0
    for scale in range(4):
        size = 2 ** (4 - scale) + 1
        place = np.arange(size) - size // 2
        window = np.exp(-(place**2) / (2 * (size / 5) ** 2))
        window = np.outer(window, window) / window.sum() ** 2

        def blurred(x, window=window):
            return convolve2d(x, window, mode="valid")

        if scale:
            image, reference = blurred(image)[::2, ::2], blurred(reference)[::2, ::2]
        mean_i, mean_r = blurred(image), blurred(reference)
        var_i = np.maximum(blurred(image**2) - mean_i**2, 0)
        var_r = np.maximum(blurred(reference**2) - mean_r**2, 0)
        gain = (blurred(image * reference) - mean_i * mean_r) / (var_r + 1e-10)
        noise = var_i - gain * (blurred(image * reference) - mean_i * mean_r)
        noise = np.maximum(np.where(gain < 0, var_i, noise), 1e-10)
        gain = np.maximum(gain, 0)
        left += np.log10(1 + gain**2 * var_r / (noise + 2)).sum()
        all_ += np.log10(1 + var_r / 2).sum()
    return left / all_


def test_vif_is_the_share_of_information_that_is_left():
    images, references = pair(64)
    found = VIF()(images, references)
    levels = [((x.double().numpy() + 1) * 127.5) for x in (images, references)]
    for i in range(2):
        expected = np.mean([vif(levels[0][i, c], levels[1][i, c]) for c in range(3)])
        assert float(found[i]) == pytest.approx(expected, rel=1e-6)
    assert VIF()(references, references).tolist() == pytest.approx([1, 1], rel=1e-6)


def test_evaluate_measures_them_by_name(two_models, five_photos, tmp_path):
    assert list(FURTHER_METRICS) == list(command.FURTHER_METRICS)
    assert evaluate_one(two_models, five_photos, tmp_path / "report", "--limit", "1", "--metrics", "vif") == 0
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())["results"]
    assert all(0 < row["metrics"]["vif"]["mean"] < 2 for row in found.values())
    assert "VIF" in (tmp_path / "report" / "report.html").read_text()
    assert ":vif" in (tmp_path / "report" / "images.csv").read_text().splitlines()[0]


def test_weights_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"not weights")
    with pytest.raises(FileNotFoundError, match=r"DISTS: vgg16-397923af.pth could neither .*TORCH_HOME"):
        DISTS()
