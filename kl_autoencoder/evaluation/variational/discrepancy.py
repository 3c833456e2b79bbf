"""Maximum mean discrepancy (Gretton et al. 2012): a distance between the distributions of two samples.

The kernel is the mean of Gaussians exp(-|x - y|^2 / (2 s^2 D)) for the scales s in SCALES, with D the number of
channels. It is bounded and characteristic, so that the discrepancy is 0 only for equal distributions. Latents and
priors of unit variance have squared distances of 2 D on average: s = 1 and 3 measure the overall shape, s = 0.1 and
0.3 the arms of a mixture or a roll. The scales are fixed, as the usual median heuristic would give each model a
different kernel, and their values could not be compared.
"""

import torch
from torch import Tensor

SCALES = (0.1, 0.3, 1.0, 3.0)


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """The kernel between all pairs of x (N, D) and y (M, D): (N, M), in (0, 1]."""
    distance = torch.cdist(x, y).square() / x.shape[1]
    return torch.stack([torch.exp(-distance / (2 * scale**2)) for scale in SCALES]).mean(0)


def squared_mmd(x: Tensor, y: Tensor, at_once: int = 2**22) -> float:
    """Unbiased estimate of MMD^2 between samples x (N, D) and y (M, D) (Gretton et al. 2012, lemma 6).

    For equal distributions it is around 0, and often negative. Computed in float64, `at_once` kernel values at a
    time. Raises ValueError if N or M is below 2.
    """
    x, y = x.double(), y.double()
    if min(len(x), len(y)) < 2:
        raise ValueError(f"samples: {len(x)} and {len(y)}; allowed: at least 2 of each")
    # minus len(a): the pairs of a point with itself, whose kernel is 1
    within = [(_kernel_sum(a, a, at_once) - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return sum(within) - 2 * _kernel_sum(x, y, at_once) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor, at_once: int) -> float:
    return sum(float(kernel(part, y).sum()) for part in x.split(max(1, at_once // len(y))))
