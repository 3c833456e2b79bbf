"""Likelihoods p(x|z), as pure functions: the negative log-likelihood of each value, in float32.

Each takes the image x, its reconstruction y, (B, C, H, W), and the logarithm of the likelihood's scale, a scalar
that is learned where the likelihood is in LEARNED_SCALE and None elsewhere; it returns (B, C, H, W). A new one is a
function here and its name in LIKELIHOODS and in `LossConfig.reconstruction`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY_FLOOR = 1e-3


def l1(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """|x - y|, Laplace of scale 1 up to a constant."""
    return (x - y).abs()


def l2(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """(x - y)^2, a Gaussian of variance 1/2 up to a constant."""
    return (x - y).square()


def laplace(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of a Laplace distribution, log_scale = log b."""
    return (x - y).abs() * torch.exp(-log_scale) + log_scale + math.log(2)


def gaussian(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of a Gaussian, log_scale = log of its deviation (Kingma & Welling 2013, appendix C.2)."""
    return 0.5 * ((x - y).square() * torch.exp(-2 * log_scale) + math.log(2 * math.pi)) + log_scale


def bernoulli(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """Cross-entropy of (x + 1) / 2 under the probability (y + 1) / 2.

    The probability is clamped to [1e-3, 1 - 1e-3]; what lies beyond is pulled back by its square, so the bound
    stays a bound. Raises ValueError for images outside of [-1, 1], whose values are no probabilities: 8-bit images
    are never, tensors of one's own and a view that scales may be.
    """
    if x.abs().max() > 1:
        raise ValueError(
            f"loss.reconstruction: bernoulli of images from {float(x.min()):g} to {float(x.max()):g}; "
            "allowed: -1 to 1"
        )
    wanted, raw = (x + 1) / 2, (y + 1) / 2
    p = raw.clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return F.binary_cross_entropy(p, wanted, reduction="none") + (raw - p).square()


LIKELIHOODS: dict[str, Callable] = {f.__name__: f for f in (l1, l2, gaussian, laplace, bernoulli)}
LEARNED_SCALE = ("gaussian", "laplace")


def reconstruction_nll(
    kind: str, reconstruction: Tensor, images: Tensor, log_scale: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of `images` given `reconstruction`, per dimension: (B, C, H, W), float32.

    Raises ValueError for a `kind` that is not in LIKELIHOODS.
    """
    if kind not in LIKELIHOODS:
        raise ValueError(f"loss.reconstruction: {kind!r}; allowed: {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[kind](images.float(), reconstruction.float(), log_scale)
