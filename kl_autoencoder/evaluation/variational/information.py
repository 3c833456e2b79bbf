"""How much information latents hold on their images, and how their overall distribution differs from the prior.

Posteriors of N images are N(mean, exp(logvar)), both (N, D), where D counts all latent values of an image. All is
computed in float64.
"""

import math

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016


def active_units(mean: Tensor) -> Tensor:
    """Posterior means (N, D) -> (D,), bool: whether the variance of a latent's mean over the images is above 0.01.

    Burda et al. 2016, section 5.
    """
    return mean.double().var(0, correction=0) > ACTIVE_VARIANCE


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw once from each posterior: (N, D), float64."""
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return mean.double() + (0.5 * logvar.double()).exp() * noise


def aggregate_log_density(z: Tensor, mean: Tensor, logvar: Tensor, at_once: int = 2**22) -> Tensor:
    """log q(z) in nats of the aggregate posterior q(z) = 1/N sum_n q(z|x_n): (M, D) -> (M,).

    The M x N densities are computed at most `at_once` at a time.
    """
    mean, logvar = mean.double(), logvar.double()
    # sum_d (z - mean)^2 / var by matrix products, which need no tensor (M, N, D)
    precision = (-logvar).exp()
    constant = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    found = []
    for part in z.double().split(max(1, at_once // len(mean))):
        distance = part.square() @ precision.T - 2 * part @ (mean * precision).T + constant
        found.append(torch.logsumexp(-0.5 * distance, 1) - math.log(len(mean)))
    return torch.cat(found)


def split_rate(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> dict[str, float]:
    """Split the rate E[KL(q(z|x) || p(z))] into two parts (Hoffman & Johnson 2016), in nats per image.

    mutual_information: I_q(x; z) between a latent and the number of its image, at most log N. aggregate_kl:
    KL(q(z) || N(0, I)) of the aggregate posterior. Both are estimated with one draw per image and the aggregate of
    these N images. If the images are a part of a data set, mutual_information is too small for the whole set and
    aggregate_kl too large, while their sum, the rate, is right in expectation.
    """
    z = draw(mean, logvar, generator)
    log_q_of_x = _log_density(z, mean.double(), logvar.double())
    log_q = aggregate_log_density(z, mean, logvar)
    log_p = _log_density(z, torch.zeros_like(z), torch.zeros_like(z))
    return {
        "mutual_information": float((log_q_of_x - log_q).mean()),
        "aggregate_kl": float((log_q - log_p).mean()),
    }


def _log_density(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mean, exp(logvar)), all (N, D) -> (N,)."""
    terms = (z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)
    return -0.5 * terms.sum(1)
