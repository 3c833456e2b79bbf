"""The terms of the objective, as pure functions of tensors, all in float32.

The objective is the negative ELBO per pixel dimension plus a perceptual term. With D = C*H*W values an image,

    loss = (reconstruction_nll_sum + kl_weight * kl_sum) / D + perceptual_weight * LPIPS

averaged over the batch (LPIPS is kl_autoencoder.evaluation.metrics.LPIPS). So `kl_weight: 1e-6` means what it
means in the latent-diffusion configs (which divide both sums by the batch alone), at any resolution; and
`gaussian` with `kl_weight: 1` is the textbook VAE in nats per dimension (Kingma & Welling 2013, eq. 3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEARNED_SCALE = ("gaussian", "laplace")  # the likelihoods that have a scale of their own to learn
PROBABILITY_FLOOR = 1e-3
LARGEST_ADAPTIVE_WEIGHT = 1e4  # of an nll that is summed over an image


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


# -------------------------------------------------------------------- adversarial


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, from its logits of real and reconstructed images; a scalar, float32.

    hinge (Lim & Ye 2017): (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2, as in VQGAN.
    logistic (Goodfellow et al. 2014): (E[softplus(-real)] + E[softplus(fake)]) / 2.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """What the autoencoder minimises: hinge -E[fake], logistic E[softplus(-fake)] (non-saturating)."""
    fake = fake.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(nll_gradient: Tensor, adversarial_gradient: Tensor, largest: float) -> Tensor:
    """|grad nll| / (|grad adversarial| + 1e-4), in [0, largest] and never NaN (Esser et al. 2021, eq. 7).

    largest: latent diffusion's 1e4 is for an nll summed over the D values of an image. Ours is divided by D, and so
        is the whole objective: the same clamp is 1e4 / D here (0.051 at 256x256), `LARGEST_ADAPTIVE_WEIGHT` / D.
    """
    weight = nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return torch.nan_to_num(weight, nan=0.0, posinf=0.0).clamp(0, largest)


def lecam(real: Tensor, fake: Tensor, real_anchor: Tensor, fake_anchor: Tensor) -> Tensor:
    """Draws the logits of each kind towards the other kind's moving average (Tseng et al. 2021, eq. 3)."""
    return (real.float() - fake_anchor).square().mean() + (fake.float() - real_anchor).square().mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Half the squared norm of the logits' gradient in real `images`, an image (Mescheder et al. 2018, eq. 9)."""
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
