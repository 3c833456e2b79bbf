"""The Frechet distance between two sets of images (Heusel et al. 2017, eq. 6), on the features of a network.

The rFID of the literature is the one on Inception's features, with the weights and the resizing of torch-fidelity,
which are those of the original TensorFlow code.
"""

import socket
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import needs
from ..files import read_tensors
from .metrics import LPIPS, to_8_bits

PATIENCE = 5.0  # seconds to wait for a host before a file counts as out of reach

Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> (B, D)


class FeatureSums:
    """What of the features of any number of images their distance depends on, in float64."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def update(self, features: Tensor) -> None:
        """Add (B, D)."""
        values = features.detach().cpu().double().numpy()
        self.count += len(values)
        self.sum = self.sum + values.sum(axis=0)
        self.products = self.products + values.T @ values

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Of the images of both together."""
        total = FeatureSums()
        total.count, total.sum = self.count + other.count, self.sum + other.sum
        total.products = self.products + other.products
        return total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D), divided by n - 1."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). ValueError for fewer than two images.

    With S_a = R R^T and S_b = Q Q^T the trace of (S_a S_b)^(1/2) is the sum of the singular values of R^T Q. Their
    rounding errors are not made larger by a square root, as those of the eigenvalues of the product are where a
    covariance has no inverse (fewer images than features).
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"Frechet distance: {a.count} and {b.count} images; allowed: at least 2 each")
    (mean_a, covariance_a), (mean_b, covariance_b) = a.statistics(), b.statistics()
    overlap = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap.sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """R with R R^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def inception(device: torch.device) -> Features:
    """The 2048 features of the FID. FileNotFoundError, saying what to do, without its weights (91 MB)."""
    with needs("eval"):
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with download_timeout():
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix="6726825d")
        except (OSError, RuntimeError) as error:  # a URLError is an OSError; a RuntimeError is a wrong hash
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise FileNotFoundError(
                f"the Inception weights are not in {path.parent} and could not be downloaded ({reason}); "
                f"put {URL_INCEPTION_V3} there"
            ) from None
    read_tensors(path)  # torch-fidelity would run what a pickle says; this one refuses all but tensors
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    return lambda images: network(to_8_bits(images).to(device))[0]


def squeezenet(device: torch.device) -> Features:
    """The last 512 feature maps of the SqueezeNet of LPIPS, averaged. FileNotFoundError without its weights."""
    with download_timeout():
        network = LPIPS("squeeze").to(device).lpips
    return lambda images: network.net(network.scaling_layer(images.to(device)))[-1].mean(dim=(2, 3))


@contextmanager
def download_timeout() -> Iterator[None]:
    """Downloads in this block give up where nothing comes for `PATIENCE` seconds, instead of never."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
