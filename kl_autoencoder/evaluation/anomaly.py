"""How strange a photograph is to a model: scores from what the model makes of it, calibrated on a reference.

`error`, `kl` and `bound` are means over the image, and find what is strange all over: noise, another domain. A
defect in a part of it drowns there: photographs differ far more in how much texture they have than a small square
adds. `local` finds those. It asks not how large the error is but how unlike the errors of the reference: the model
loses edges and texture of all photographs, so errors have a typical spectrum and hardly any colour. Patches of the
error are whitened with the reference's covariance (their Mahalanobis distance); the largest window of those counts.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder_kl import KLAutoencoder
from ..networks.distributions import DiagonalGaussian

SCORES = ("error", "kl", "bound", "local")
PATCH, STRIDE, WINDOW = 8, 4, 16  # pixels
ROUNDING = (2 / 255) ** 2 / 12  # variance of 8-bit rounding in [-1, 1]: no error is known better


class Detector:
    """Scores of photographs, each the higher the stranger, after looking at ordinary ones.

    Args:
        vae: in float32.
        fitting, calibrating: ordinary photographs, (1, 3, H, W) in [-1, 1] with sides that are multiples of f, two
            sets of which the first says what the errors are like and the second what ordinary photographs score.

    The scores, in float64:
        error: the mean squared error of the reconstruction from the posterior's mode.
        kl: |KL(q(z|x) || N(0, I)) - its median|, nats per pixel dimension: a model that knows nothing of an image
            may well spend fewer nats on it than on a photograph. 0 for models without a Gaussian posterior.
        bound: the negative evidence lower bound, -log N(x; reconstruction, s^2) + KL in nats per pixel dimension,
            with s^2 the mean squared error of the reference, its maximum-likelihood value (Kingma & Welling 2013,
            C.2), and the posterior's mode for a sample.
        local: the largest mean over 16x16 pixels of the squared error, whitened; 1 is the reference's mean.
    """

    def __init__(self, vae: KLAutoencoder, fitting: Iterable[Tensor], calibrating: Iterable[Tensor]):
        self.vae = vae
        covariance, errors, kls, count = 0.0, [], [], 0
        for images in fitting:
            residual, kl = self.residual_and_kl(images)
            x = patches(residual).flatten(0, 1)
            covariance, count = covariance + x.T @ x, count + len(x)
            errors.append(float(residual.square().mean()))
            kls.append(kl)
        if not errors:
            raise ValueError("no reference photographs to calibrate on")
        self.variance, self.usual_kl = float(np.mean(errors)), float(np.median(kls))
        noise = ROUNDING * torch.eye(len(covariance), dtype=torch.float64)
        self.whitening = torch.linalg.inv(torch.linalg.cholesky(covariance / count + noise))
        scored = [self.scores(images) for images in calibrating]
        if not scored:
            raise ValueError("one reference photograph is too few; allowed: at least two")
        self.reference = {name: np.sort([scores[name] for scores in scored]) for name in SCORES}

    @torch.inference_mode()
    def residual_and_kl(self, images: Tensor) -> tuple[Tensor, float]:
        """(1, 3, H, W) -> what the model leaves unexplained, in float64 on the CPU, and KL per pixel dimension."""
        images = images.to(self.vae.device)
        posterior = self.vae.encode(images).latent_dist
        residual = images - self.vae.decode(posterior.mode()).sample
        kl = float(posterior.kl()) if isinstance(posterior, DiagonalGaussian) else 0.0
        return residual.double().cpu(), kl / images.numel()

    def scores(self, images: Tensor) -> dict[str, float]:
        """(1, 3, H, W) -> the score under each name."""
        residual, kl = self.residual_and_kl(images)
        error = float(residual.square().mean())
        nll = 0.5 * (error / self.variance + np.log(2 * np.pi * self.variance))
        distances = (patches(residual) @ self.whitening.T).square().mean(2)
        rows, columns = ((side - PATCH) // STRIDE + 1 for side in residual.shape[2:])
        local = largest_mean(distances.view(1, 1, rows, columns), (WINDOW - PATCH) // STRIDE + 1)
        return {"error": error, "kl": abs(kl - self.usual_kl), "bound": nll + kl, "local": float(local)}

    def p_value(self, name: str, score: float) -> float:
        """The share of ordinary photographs that score as high: (1 + those of the reference) / (1 + all)."""
        reference = self.reference[name]
        return float(1 + len(reference) - np.searchsorted(reference, score)) / (1 + len(reference))


def patches(residual: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C * 64): squares of 8x8 pixels, 4 pixels apart, row by row."""
    return F.unfold(residual, PATCH, stride=STRIDE).transpose(1, 2)


def largest_mean(values: Tensor, window: int) -> Tensor:
    """(B, 1, H, W) -> (B,): the largest mean over a square of `window`, at most the image, at any place."""
    return F.avg_pool2d(values, [min(window, side) for side in values.shape[2:]], stride=1).amax((1, 2, 3))


def roc(scores: np.ndarray, strange: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(false positive rates, true positive rates, area under the curve), from (0, 0) to (1, 1); ties as one step.

    `strange`: whether each score is that of a strange one. ValueError unless there are both kinds.
    """
    scores, strange = np.asarray(scores), np.asarray(strange, dtype=bool)
    if strange.all() or not strange.any():
        raise ValueError(f"labels: all are {int(strange.any())}; allowed: some 0 and some 1")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each run of equal scores
    true, false = np.cumsum(strange[order])[last], np.cumsum(~strange[order])[last]
    tpr, fpr = np.insert(true / true[-1], 0, 0.0), np.insert(false / false[-1], 0, 0.0)
    return fpr, tpr, float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
