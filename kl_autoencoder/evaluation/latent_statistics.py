"""Statistics of latents over a set of images: moments and correlation of channels, logvar, power spectrum."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..networks.distributions import LOGVAR_RANGE, DiagonalGaussian

ACTIVE_NATS = 0.01  # mean KL per latent value above which a channel is active, as in the training program
LOGVAR_EDGES = np.arange(LOGVAR_RANGE[0], LOGVAR_RANGE[1] + 0.5, 0.5)
SPECTRUM_EDGES = np.linspace(0.0, 1.0, 17)  # frequency bins; 1 is the Nyquist frequency


class SpectrumSum:
    """Radially averaged power spectrum of any number of images or latents (C, H, W), summed over channels."""

    def __init__(self):
        self.power = np.zeros(len(SPECTRUM_EDGES) - 1)
        self.count = np.zeros(len(SPECTRUM_EDGES) - 1)

    def update(self, planes: Tensor) -> None:
        """Add one (C, H, W). A Hann window keeps the jump between opposite edges out of the spectrum."""
        planes = planes.detach().cpu().double()
        height, width = planes.shape[1:]
        window = torch.outer(*(torch.hann_window(n, periodic=False).double() for n in (height, width)))
        planes = (planes - planes.mean(dim=(1, 2), keepdim=True)) * window
        power = torch.fft.fft2(planes).abs().square().sum(0) / window.square().sum()
        y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
        radius = 2 * np.hypot(x, y)  # 1 is Nyquist
        inside = (radius > 0) & (radius <= 1)
        bins = {"bins": SPECTRUM_EDGES}
        self.power += np.histogram(radius[inside], weights=power.numpy()[inside], **bins)[0]
        self.count += np.histogram(radius[inside], **bins)[0]

    def __add__(self, other: "SpectrumSum") -> "SpectrumSum":
        total = SpectrumSum()
        total.power, total.count = self.power + other.power, self.count + other.count
        return total

    def summary(self) -> dict[str, Any]:
        """Return the spectrum, ready for JSON; bins without power are left out.

        frequency: centres of the bins, as a share of the Nyquist frequency. power: normalised to mean 1, so that
        white noise has 1 everywhere. slope: of log power over log frequency. high_frequency_share: share of the
        power above half the Nyquist frequency. With fewer than two bins, the lists are empty and the numbers None.
        """
        centres = (SPECTRUM_EDGES[1:] + SPECTRUM_EDGES[:-1]) / 2
        seen = (self.count > 0) & (self.power > 0)  # the lowest bins are empty for small latents
        total = self.power.sum()
        if seen.sum() < 2:
            return {"frequency": [], "power": [], "slope": None, "high_frequency_share": None}
        power = self.power[seen] / self.count[seen] * (self.count.sum() / total)
        return {
            "frequency": centres[seen].tolist(),
            "power": power.tolist(),
            "slope": float(np.polyfit(np.log(centres[seen]), np.log(power), 1)[0]),
            "high_frequency_share": float(self.power[centres > 0.5].sum() / total),
        }


class LatentSums:
    """Sums over the posteriors of any number of images for `summary`, in float64; those of several ranks add up."""

    def __init__(self, channels: int):
        self.count = 0
        self.powers = np.zeros((4, channels))  # sums of z, z^2, z^3, z^4 over the posteriors' means
        self.products = np.zeros((channels, channels))
        self.kl, self.logvar = np.zeros(channels), np.zeros(channels)
        self.histogram = np.zeros(len(LOGVAR_EDGES) - 1, dtype=np.int64)  # of logvar, all channels
        self.spectrum = SpectrumSum()

    def update(self, posterior: DiagonalGaussian) -> None:
        """Add a batch of posteriors (B, C, h, w); images with non-finite values are left out."""
        finite = posterior.parameters.isfinite().all(dim=(1, 2, 3))
        mean = posterior.mean[finite].double().cpu()
        logvar = posterior.logvar[finite].double().cpu()
        values = mean.transpose(0, 1).flatten(1).numpy()  # (C, B*h*w)
        self.count += values.shape[1]
        self.powers += [(values**k).sum(axis=1) for k in (1, 2, 3, 4)]
        self.products += values @ values.T
        self.kl += posterior.kl_map()[finite].double().sum(dim=(0, 2, 3)).cpu().numpy()
        self.logvar += logvar.sum(dim=(0, 2, 3)).numpy()
        self.histogram += np.histogram(logvar.numpy(), LOGVAR_EDGES)[0]
        for one in mean:
            self.spectrum.update(one)

    def __add__(self, other: "LatentSums") -> "LatentSums":
        total = LatentSums(len(self.kl))
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    def summary(self) -> dict[str, Any]:
        """Return the statistics, ready for JSON. Raises ValueError if no finite latents were added.

        Per channel: mean, std, kurtosis (3 for a normal distribution), kl (nats per latent value) and logvar
        (means). Over all: active_channels, effective_dimension, correlation (C x C), logvar_histogram, spectrum,
        and shift_factor and scaling_factor, with which (z - shift) * scaling has mean 0 and deviation 1 over all
        channels together. Without variance scaling_factor is None.
        """
        if not self.count:
            raise ValueError("no latents that are finite")
        first, second, third, fourth = self.powers / self.count
        covariance = self.products / self.count - np.outer(first, first)
        variance = np.maximum(second - first**2, 0.0)
        centred = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        with np.errstate(divide="ignore", invalid="ignore"):  # both are undefined for a constant channel
            kurtosis = centred / variance**2
            correlation = np.clip(covariance / np.sqrt(np.outer(variance, variance)), -1, 1)
        shift = float(first.mean())
        spread = float(np.sqrt((variance + (first - shift) ** 2).mean()))
        kl = self.kl / self.count
        return {
            "mean": first.tolist(),
            "std": np.sqrt(variance).tolist(),
            "kurtosis": kurtosis.tolist(),
            "kl": kl.tolist(),
            "logvar": (self.logvar / self.count).tolist(),
            "active_channels": int((kl > ACTIVE_NATS).sum()),
            "effective_dimension": effective_dimension(covariance),
            "correlation": correlation.tolist(),
            "shift_factor": shift,
            "scaling_factor": 1 / spread if spread else None,
            "logvar_histogram": {"edges": LOGVAR_EDGES.tolist(), "counts": self.histogram.tolist()},
            "spectrum": self.spectrum.summary(),
        }


def effective_dimension(covariance: np.ndarray) -> float | None:
    """The participation ratio of a covariance (C, C): (sum of eigenvalues)^2 / sum of squared eigenvalues.

    From 1, for perfectly correlated channels, to C, for uncorrelated channels of equal variance. None if the
    covariance is 0.
    """
    squares = float(np.square(covariance).sum())
    return float(np.trace(covariance)) ** 2 / squares if squares else None
