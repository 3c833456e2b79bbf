"""The Frechet distance against scipy and torch-fidelity, and the features it is measured on."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from kl_autoencoder.evaluation import frechet
from kl_autoencoder.evaluation.frechet import FeatureSums, frechet_distance
from tests.conftest import backbone_missing

CPU = torch.device("cpu")


def sums(features):
    total = FeatureSums()
    total.update(torch.from_numpy(features))
    return total


def test_the_distance_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 6)), rng.normal(0.5, 1.5, size=(50, 6)) @ rng.normal(size=(6, 6))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(sums(a), sums(b)) == pytest.approx(expected, rel=1e-9)
    theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    assert fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"] == pytest.approx(expected)
    assert frechet_distance(sums(a[:30]) + sums(a[30:]), sums(b)) == pytest.approx(expected, rel=1e-9)
    few = rng.normal(size=(4, 6))  # fewer images than features: a covariance without an inverse
    assert frechet_distance(sums(few), sums(few)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="80 and 1 images; allowed: at least 2"):
        frechet_distance(sums(a), sums(b[:1]))


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A TORCH_HOME with a file of Inception weights, random ones, in the place of those that are downloaded."""
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("random", ["2048"])
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return path


def test_inception_features_are_those_of_torch_fidelity(inception_weights, photographs):
    paths = sorted(photographs.glob("*.png"))[::24]
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    network = torch_fidelity.utils.create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    (expected,) = network(images)
    assert expected.shape == (2, 2048) and expected.std() > 0
    torch.testing.assert_close(frechet.inception(CPU)(images / 127.5 - 1), expected)


def test_a_pickle_in_the_place_of_the_weights_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"run": print}, folder / "weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="refused, and nothing in it was run"):
        frechet.inception(CPU)


def test_missing_weights_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(
        FileNotFoundError, match=r"Inception weights are not in .*put http://127.0.0.1:9/weights.pth"
    ):
        frechet.inception(CPU)
    assert not list((tmp_path / "hub" / "checkpoints").glob("*"))


@pytest.mark.skipif(backbone_missing("squeeze"), reason="the backbone squeeze is not in TORCH_HOME")
def test_squeezenet_features_are_torchvisions():
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1(weights="IMAGENET1K_V1").eval()
    images = torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network.features((images - mean[:, None, None]) / std[:, None, None]).mean(dim=(2, 3))
        found = frechet.squeezenet(CPU)(images * 2 - 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
