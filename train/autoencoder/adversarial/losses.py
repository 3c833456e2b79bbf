"""Adversarial losses and regularisers of the discriminator, as pure functions of tensors, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ADAPTIVE_WEIGHT = 1e4  # for an nll that is summed over the values of an image


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The loss that the discriminator minimises, a scalar, float32.

    real, fake: its logits of real and of reconstructed images, of any shape. kind: "hinge" (Lim & Ye 2017; as in
    VQGAN), (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2, or "logistic" (Goodfellow et al. 2014),
    (E[softplus(-real)] + E[softplus(fake)]) / 2.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """The loss that the autoencoder minimises, a scalar: "hinge" -E[fake], "logistic" E[softplus(-fake)].

    fake: the discriminator's logits of reconstructed images. The logistic one is the non-saturating loss.
    """
    fake = fake.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(nll_gradient: Tensor, adversarial_gradient: Tensor, largest: float) -> Tensor:
    """|grad nll| / (|grad adversarial| + 1e-4), in [0, largest] and never NaN (Esser et al. 2021, eq. 7).

    nll_gradient, adversarial_gradient: in the weight of the decoder's last layer. largest: latent diffusion clamps
    to 1e4, for an nll summed over the D values of an image. Here the whole objective is divided by D, so the same
    clamp is `LARGEST_ADAPTIVE_WEIGHT` / D, 0.051 for RGB at 256x256.
    """
    weight = nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return torch.nan_to_num(weight, nan=0.0, posinf=0.0).clamp(0, largest)


def lecam(real: Tensor, fake: Tensor, real_anchor: Tensor, fake_anchor: Tensor) -> Tensor:
    """LeCam regularisation, E[(real - fake_anchor)^2] + E[(fake - real_anchor)^2] (Tseng et al. 2021, eq. 3).

    It draws the logits of real images to the moving average of the logits of fake ones, `fake_anchor`, and vice
    versa.
    """
    return (real.float() - fake_anchor).square().mean() + (fake.float() - real_anchor).square().mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1: half the squared norm of the gradient of an image's logits in the image (Mescheder et al. 2018, eq. 9).

    images: real ones, (B, C, H, W), which require a gradient; logits: of these, summed over patches. The result is
    the mean over the batch, a scalar that can be differentiated again.
    """
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
