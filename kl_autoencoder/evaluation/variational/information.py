"""How much latents say of images, and how their distribution over all images differs from the prior.

Posteriors are N(mean, exp(logvar)) of N images, (N, D) each, in float64; D is all latent values of an image.
"""

import math

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016


def active_units(mean: Tensor) -> Tensor:
    """Which latents are active, (N, D) -> (D,) bool: those whose posterior mean has a variance above 0.01."""
    return mean.double().var(0, correction=0) > ACTIVE_VARIANCE


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from each posterior, (N, D)."""
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return mean.double() + (0.5 * logvar.double()).exp() * noise


def aggregate_log_density(z: Tensor, mean: Tensor, logvar: Tensor, at_once: int = 2**22) -> Tensor:
    """log q(z) of the aggregate posterior q(z) = 1/N sum_n q(z|x_n), (M, D) -> (M,), in nats.

    `at_once` values are held at a time.
    """
    mean, logvar = mean.double(), logvar.double()
    # sum_d (z - mean)^2 / var as products of matrices, so that no (M, N, D) is ever held
    precision = (-logvar).exp()
    constant = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    found = []
    for part in z.double().split(max(1, at_once // len(mean))):
        distance = part.square() @ precision.T - 2 * part @ (mean * precision).T + constant
        found.append(torch.logsumexp(-0.5 * distance, 1) - math.log(len(mean)))
    return torch.cat(found)


def split_rate(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> dict[str, float]:
    """E[KL(q(z|x) || p(z))] as what it is made of (Hoffman & Johnson 2016), in nats per image.

    mutual_information: I_q(x; z), of the latents with which of the N images they are of, at most log N.
    aggregate_kl: KL(q(z) || N(0, I)). Both by one draw an image, over the aggregate of these N images. Of a part of
    a data set the first is too small and the second too large; their sum, the rate, is the same in expectation.
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
    terms = (z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)
    return -0.5 * terms.sum(1)
