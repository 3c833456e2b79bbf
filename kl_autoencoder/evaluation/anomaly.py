"""Score how unusual a photograph is to a model, compared with a reference set of ordinary photographs.

`error`, `kl` and `bound` are means over the image. They find images that are unusual all over: noise, another
domain. They miss a small defect, because photographs differ far more in their amount of texture than a small defect
adds. `local` finds small defects: it measures not how large the error is but how unlike the errors of the
reference. The model loses edges and texture of every photograph, so ordinary errors have a typical spectrum and
hardly any colour. Patches of the error are whitened with the covariance of the reference's patches, which gives
their Mahalanobis distance; the score is the largest mean of these squared distances over a window.
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
ROUNDING = (2 / 255) ** 2 / 12  # variance of 8-bit rounding in [-1, 1], added to that of the errors


class Detector:
    """Scores photographs after calibration on ordinary ones; every score is higher for more unusual photographs.

    Args:
        vae: model of RGB images, in float32.
        fitting, calibrating: two sets of ordinary photographs, each (1, 3, H, W) in [-1, 1] with sides that are
            multiples of f. `fitting` gives the covariance of errors, their variance and the median KL;
            `calibrating` gives the scores of ordinary photographs.

    Raises ValueError if either set is empty.

    Scores, in float64; a pixel value is one channel of one pixel:
        error: mean squared error of the reconstruction from the posterior's mode.
        kl: |KL(q(z|x) || N(0, I)) - its median over `fitting`| in nats per pixel value. The distance to the median,
            because the KL of an image that is foreign to the model may also be unusually small. 0 for models
            without a Gaussian posterior.
        bound: negative evidence lower bound, -log N(x; reconstruction, s^2) + KL, in nats per pixel value. s^2 is
            the mean squared error over `fitting`, its maximum-likelihood value (Kingma & Welling 2013, C.2); the
            posterior's mode stands in for a sample.
        local: largest mean of the whitened squared error over a window of 16x16 pixels; about 1 on average over
            the patches of `fitting`.
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
        """Image (1, 3, H, W) -> residual x - D(mode), float64 on the CPU, and KL in nats per pixel value."""
        images = images.to(self.vae.device)
        posterior = self.vae.encode(images).latent_dist
        residual = images - self.vae.decode(posterior.mode()).sample
        kl = float(posterior.kl()) if isinstance(posterior, DiagonalGaussian) else 0.0
        return residual.double().cpu(), kl / images.numel()

    def scores(self, images: Tensor) -> dict[str, float]:
        """Image (1, 3, H, W) in [-1, 1] -> its score under each name of `SCORES`."""
        residual, kl = self.residual_and_kl(images)
        error = float(residual.square().mean())
        nll = 0.5 * (error / self.variance + np.log(2 * np.pi * self.variance))
        distances = (patches(residual) @ self.whitening.T).square().mean(2)
        rows, columns = ((side - PATCH) // STRIDE + 1 for side in residual.shape[2:])
        local = largest_mean(distances.view(1, 1, rows, columns), (WINDOW - PATCH) // STRIDE + 1)
        return {"error": error, "kl": abs(kl - self.usual_kl), "bound": nll + kl, "local": float(local)}

    def p_value(self, name: str, score: float) -> float:
        """Estimate the probability that an ordinary photograph scores at least `score`, in (0, 1].

        (1 + k) / (1 + n), where k of the n calibrating photographs score at least `score`.
        """
        reference = self.reference[name]
        return float(1 + len(reference) - np.searchsorted(reference, score)) / (1 + len(reference))


def patches(residual: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C * 64): patches of 8x8 pixels, 4 pixels apart, in row-major order."""
    return F.unfold(residual, PATCH, stride=STRIDE).transpose(1, 2)


def largest_mean(values: Tensor, window: int) -> Tensor:
    """(B, 1, H, W) -> (B,): the largest mean over any square of side `window`; smaller images limit its sides."""
    return F.avg_pool2d(values, [min(window, side) for side in values.shape[2:]], stride=1).amax((1, 2, 3))


def roc(scores: np.ndarray, strange: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the ROC curve: (false positive rates, true positive rates, area under the curve).

    scores: (N,), higher for more unusual images. strange: (N,), bool, the true labels. The curve runs from (0, 0)
    to (1, 1); equal scores are one step. Raises ValueError unless both labels occur.
    """
    scores, strange = np.asarray(scores), np.asarray(strange, dtype=bool)
    if strange.all() or not strange.any():
        raise ValueError(f"labels: all are {int(strange.any())}; allowed: some 0 and some 1")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last of each run of equal scores
    true, false = np.cumsum(strange[order])[last], np.cumsum(~strange[order])[last]
    tpr, fpr = np.insert(true / true[-1], 0, 0.0), np.insert(false / false[-1], 0, 0.0)
    return fpr, tpr, float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
