"""Adversarial losses and regularisers of the discriminator, as pure functions of tensors, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ADAPTIVE_WEIGHT = 1e4  # of an nll that is summed over an image


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
