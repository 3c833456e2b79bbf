"""Log-likelihoods log p(x|z) in nats per image, from normalised densities, in float64.

Images and reconstructions are (B, C, H, W) in [-1, 1], and densities are over values on this scale. They are the
training program's likelihoods of the same names, without its penalty on Bernoulli means outside [0, 1].
"""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, Normal

PROBABILITY_FLOOR = 1e-3  # smallest probability of Bernoulli, as in training
SCALED = ("gaussian", "laplace")  # have a scale, the same for all values
LIKELIHOODS = (*SCALED, "bernoulli")


def log_likelihood(kind: str, images: Tensor, decoded: Tensor, log_scale: float | None = None) -> Tensor:
    """Log-likelihood of `images` (B, C, H, W) under `decoded`, (..., B, C, H, W) -> (..., B), float64, nats.

    kind: "gaussian" with standard deviation exp(log_scale); "laplace" with scale exp(log_scale); "bernoulli" of
        (x + 1) / 2 with probability (decoded + 1) / 2, clamped to [1e-3, 1 - 1e-3]. Bernoulli is a likelihood for
        binary images only; for others it is the negative cross-entropy.

    Raises ValueError for another kind, for a missing log_scale, and for one with "bernoulli".
    """
    if kind not in LIKELIHOODS:
        raise ValueError(f"likelihood: {kind!r}; allowed: {', '.join(LIKELIHOODS)}")
    if (kind in SCALED) != (log_scale is not None):
        raise ValueError(
            f"log_scale: {log_scale}; allowed with {kind}: {'a number' if kind in SCALED else None}"
        )
    x, y = images.double(), decoded.double()
    if kind == "bernoulli":
        p = ((y + 1) / 2).clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        density = Bernoulli(probs=p, validate_args=False)
        x = (x + 1) / 2
    else:
        density = {"gaussian": Normal, "laplace": Laplace}[kind](y, math.exp(log_scale), validate_args=False)
    return density.log_prob(x).flatten(-3).sum(-1)


def best_log_scale(kind: str, mean_error: float) -> float | None:
    """The logarithm of the scale of greatest likelihood; None for Bernoulli, which has no scale.

    mean_error: mean over all values of |x - y|^2 for Gaussian (the sigma-VAE of Rybkin et al. 2021), of |x - y| for
        Laplace.
    """
    if kind not in SCALED:
        return None
    return math.log(mean_error) * (0.5 if kind == "gaussian" else 1.0)


def error(kind: str, images: Tensor, decoded: Tensor) -> float:
    """The `mean_error` of `best_log_scale`: mean squared error for Gaussian, mean absolute error for Laplace."""
    difference = images.double() - decoded.double()
    return float((difference.square() if kind == "gaussian" else difference.abs()).mean())


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """log of the mean of exp(values) over `dim`, without overflow."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])
