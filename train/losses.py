"""The terms of the objective, as pure functions of tensors, all in float32.

The objective is the negative ELBO per pixel dimension plus a perceptual term. With D = C*H*W values an image,

    loss = (reconstruction_nll_sum + kl_weight * kl_sum) / D + perceptual_weight * LPIPS

averaged over the batch (LPIPS is kl_autoencoder.metrics.LPIPS). So `kl_weight: 1e-6` means what it means in the
latent-diffusion configs (which divide both sums by the batch alone), at any resolution; and `gaussian` with
`kl_weight: 1` is the textbook VAE in nats per dimension (Kingma & Welling 2013, eq. 3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_autoencoder.posterior import DiagonalGaussian

LEARNED_SCALE = ("gaussian", "laplace")  # the likelihoods that have a scale of their own to learn
PROBABILITY_FLOOR = 1e-3


def reconstruction_nll(
    kind: str, reconstruction: Tensor, images: Tensor, log_scale: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of `images` given `reconstruction`, per dimension: (B, C, H, W), float32.

    l1, l2: |x - y| and (x - y)^2, likelihoods of a fixed scale up to a constant.
    laplace, gaussian: -log p with scale b or standard deviation s; `log_scale` = log b or log s, a scalar that is
        learned (Kingma & Welling 2013, appendix C.2 for the Gaussian).
    bernoulli: cross-entropy of (x + 1) / 2 under the probability (y + 1) / 2, which is clamped to
        [1e-3, 1 - 1e-3]; what lies beyond is pulled back by its square, so the bound stays a bound.
    """
    x, y = images.float(), reconstruction.float()
    if kind == "l1":
        return (x - y).abs()
    if kind == "l2":
        return (x - y).square()
    if kind == "laplace":
        return (x - y).abs() * torch.exp(-log_scale) + log_scale + math.log(2)
    if kind == "gaussian":
        return 0.5 * ((x - y).square() * torch.exp(-2 * log_scale) + math.log(2 * math.pi)) + log_scale
    if kind == "bernoulli":
        wanted, raw = (x + 1) / 2, (y + 1) / 2
        p = raw.clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        return F.binary_cross_entropy(p, wanted, reduction="none") + (raw - p).square()
    raise ValueError(f"loss.reconstruction: {kind!r}; allowed: l1, l2, gaussian, laplace, bernoulli")


def kl_per_dimension(posterior: DiagonalGaussian, image_dimensions: int, free_bits: float = 0.0) -> Tensor:
    """KL(q(z|x) || N(0, I)) in nats, summed over an image's latents and divided by D: (B,), float32.

    free_bits: a channel's KL counts as at least this many bits a latent value, below which it has no gradient
        (Kingma et al. 2016, appendix C.8). Taken image by image, so that a batch may be split over ranks.
    """
    channels = posterior.kl_map().mean(dim=(2, 3))  # nats a latent value, (B, C)
    if free_bits:
        channels = channels.clamp(min=free_bits * math.log(2))
    positions = posterior.mean.shape[2] * posterior.mean.shape[3]
    return channels.sum(dim=1) * (positions / image_dimensions)


def ramp(step: int, warmup_steps: int) -> float:
    """0 at step 0, 1 from `warmup_steps` on, linear between."""
    return 1.0 if step >= warmup_steps else step / warmup_steps
