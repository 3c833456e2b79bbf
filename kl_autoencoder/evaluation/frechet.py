"""The Frechet distance between two sets of images (Heusel et al. 2017, eq. 6), on the features of a network.

On Inception's features it is the rFID of the literature; weights and resizing are torch-fidelity's, which reproduce
the original TensorFlow code.
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

PATIENCE = 5.0  # seconds without an answer after which a download fails

Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> (B, D)


class FeatureSums:
    """Sums over the features of a set of images from which `frechet_distance` is computed, in float64."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def update(self, features: Tensor) -> None:
        """Add the features (B, D) of a batch."""
        values = features.detach().cpu().double().numpy()
        self.count += len(values)
        self.sum = self.sum + values.sum(axis=0)
        self.products = self.products + values.T @ values

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """The sums over the images of both."""
        total = FeatureSums()
        total.count, total.sum = self.count + other.count, self.sum + other.sum
        total.products = self.products + other.products
        return total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D) with divisor n - 1."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), mu being the means and S the covariances.

    With S_a = R R^T and S_b = Q Q^T, the trace of (S_a S_b)^(1/2) is the sum of the singular values of R^T Q. The
    usual way, square roots of the eigenvalues of S_a S_b, loses precision if a covariance is singular (fewer images
    than features), because a square root enlarges rounding errors near 0. Raises ValueError if either set has fewer
    than two images.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"Frechet distance: {a.count} and {b.count} images; allowed: at least 2 each")
    (mean_a, covariance_a), (mean_b, covariance_b) = a.statistics(), b.statistics()
    overlap = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap.sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """Return R with R R^T = covariance, both (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def inception(device: torch.device) -> Features:
    """Load the Inception network of the FID: images -> (B, 2048); downloads its weights (91 MB) if needed.

    Raises FileNotFoundError, which says what to do, if the weights can be neither found nor downloaded.
    """
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
    read_tensors(path)  # refuses anything but tensors, because torch-fidelity would run code in a pickle
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    return lambda images: network(to_8_bits(images).to(device))[0]


def squeezenet(device: torch.device) -> Features:
    """Load the SqueezeNet of LPIPS: images -> the means (B, 512) of its last feature maps.

    Raises FileNotFoundError if its weights can be neither found nor downloaded.
    """
    with download_timeout():
        network = LPIPS("squeeze").to(device).lpips
    return lambda images: network.net(network.scaling_layer(images.to(device)))[-1].mean(dim=(2, 3))


@contextmanager
def download_timeout() -> Iterator[None]:
    """Let downloads in this block fail after `PATIENCE` seconds without an answer, instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
