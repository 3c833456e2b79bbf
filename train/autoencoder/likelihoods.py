"""Likelihoods p(x|z), as pure functions: the negative log-likelihood of each value, in nats, in float32.

Each takes the images x and their reconstructions y, both (B, C, H, W), and the logarithm of the likelihood's scale:
a learned scalar for the likelihoods in LEARNED_SCALE, None for the others. It returns (B, C, H, W). To add one,
write a function here, and add it to LIKELIHOODS and its name to `LossConfig.reconstruction`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY_FLOOR = 1e-3


def l1(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """|x - y|: a Laplace distribution of scale 1, without its constant log 2."""
    return (x - y).abs()


def l2(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """(x - y)^2: a Gaussian of variance 1/2, without its constant log(pi) / 2."""
    return (x - y).square()


def laplace(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of a Laplace distribution: |x - y| / b + log 2b, with log_scale = log b."""
    return (x - y).abs() * torch.exp(-log_scale) + log_scale + math.log(2)


def gaussian(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of a Gaussian of standard deviation exp(log_scale) (Kingma & Welling 2013, appendix C.2)."""
    return 0.5 * ((x - y).square() * torch.exp(-2 * log_scale) + math.log(2 * math.pi)) + log_scale


def bernoulli(x: Tensor, y: Tensor, log_scale: Tensor | None) -> Tensor:
    """Cross-entropy between (x + 1) / 2 and the probability p = (y + 1) / 2.

    p is clamped to [1e-3, 1 - 1e-3]. The squared distance by which it lies outside is added, so that there is a
    gradient back and the loss is still an upper bound of -log p(x|z). Raises ValueError for x outside of [-1, 1],
    which cannot be turned into probabilities; 8-bit images never are, other tensors and the images of a view that
    scales may be.
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
    """Negative log-likelihood, in nats, of each value of `images` given `reconstruction`: (B, C, H, W), float32.

    kind: a name in LIKELIHOODS; ValueError for any other. reconstruction, images: (B, C, H, W), images in [-1, 1].
    log_scale: a scalar for the kinds in LEARNED_SCALE.
    """
    if kind not in LIKELIHOODS:
        raise ValueError(f"loss.reconstruction: {kind!r}; allowed: {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[kind](images.float(), reconstruction.float(), log_scale)
