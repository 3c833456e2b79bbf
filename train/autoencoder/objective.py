"""The objective of the autoencoder, and its gradient.

It is the negative ELBO per pixel dimension, with further terms. With D = C*H*W values an image,

    loss = (nll + sum_i w_i penalty_i) / D  +  w LPIPS  +  sum_j w_j term_j  +  w_adv adaptive adversarial

averaged over the batch: nll of the likelihood (likelihoods.py), the penalties of the bottleneck (the KL of the
posterior, weighted by `loss.kl.weight`), LPIPS (kl_autoencoder.evaluation.metrics), the terms of `loss.terms`, and
the adversarial term (adversary.py). So `kl.weight: 1e-6` means what it means in the latent-diffusion configs (which
divide both sums by the batch alone), at any resolution; and `gaussian` with `kl.weight: 1` is the textbook VAE in
nats per dimension (Kingma & Welling 2013, eq. 3).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from kl_autoencoder.evaluation.metrics import LPIPS

from ..config import KLConfig, LossConfig
from ..loop.schedules import ramp
from ..parts import Term
from .adversarial.adversary import Adversary
from .likelihoods import reconstruction_nll
from .model import Reconstruction

PERCEPTUAL_PIXELS = 4 * 256 * 256  # LPIPS holds some 250 MB of VGG features for each image of 256x256
# (reconstruction, images) -> a scalar and its gradient in the reconstruction
AtPixels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Objective:
    """The weighted sum of all terms, for a step. `perceptual` and `adversary` are None where a run has none."""

    def __init__(
        self, config: LossConfig, perceptual: LPIPS | None, terms: list[Term], adversary: Adversary | None
    ):
        self.config, self.perceptual, self.terms, self.adversary = config, perceptual, terms, adversary

    def __call__(self, step: int, output: Reconstruction) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return (a scalar to call backward on, the terms by name with their sum as `loss`, the reconstruction).

        The scalar has the gradient of the objective, not its value.

        The gradient in the reconstruction is formed term by term first, each network's graph being freed before
        the next is built, and goes through the autoencoder once. The norms that the adaptive weight compares
        cost no second pass through LPIPS or the discriminator that way.
        """
        images = output.targets
        reconstruction = output.images.detach().float().requires_grad_()
        with record_function("autoencoder"):
            nll = self._nll(reconstruction, images, output.log_scale)
            penalties = {name: penalty.mean() for name, penalty in output.code.penalties.items()}
            penalty = sum(
                self._weighted(name, value, step, images[0].numel()) for name, value in penalties.items()
            )
            (gradient,) = torch.autograd.grad(nll, reconstruction)
        terms, loss = {"reconstruction": nll, **penalties}, nll + penalty
        for name, weight, at_pixels in self._at_pixels(step):
            value, more = at_pixels(reconstruction, images)
            gradient = gradient + weight * more
            terms[name], loss = value, loss + weight * value
        if self.adversary is not None and self.adversary.weight(step) > 0:
            with record_function("discriminator"):
                more, value, found = self.adversary.gradient(step, reconstruction, output.features, gradient)
                gradient, loss = gradient + more, loss + value
                terms |= found
        with record_function("autoencoder"):
            # a scalar whose gradient in the output is `gradient`
            surrogate = (output.images.float() * gradient.detach()).sum() + penalty
            for term, weight in self._active("latents", step):
                value = term.compute(output.learned.get(term.name, output.code.z), output.encoded)
                surrogate = surrogate + weight * value
                terms[term.name], loss = value, loss + weight * value
            if output.log_scale is not None:
                surrogate = surrogate + self._nll(reconstruction.detach(), images, output.log_scale)
                terms["log_scale"] = output.log_scale
        return surrogate, {"loss": loss, **terms}, reconstruction.detach()

    def _nll(self, reconstruction: Tensor, images: Tensor, log_scale: Tensor | None) -> Tensor:
        return reconstruction_nll(self.config.reconstruction, reconstruction, images, log_scale).mean()

    def _weighted(self, name: str, penalty: Tensor, step: int, dimensions: int) -> Tensor:
        """The part of the loss of a bottleneck's mean penalty; all but the KL come weighted from the bottleneck."""
        return weighted_kl(self.config.kl, penalty, step, dimensions) if name == "kl" else penalty

    def _at_pixels(self, step: int) -> Iterator[tuple[str, float, AtPixels]]:
        """Name, weight, value and gradient of the terms at the pixels, beside the likelihood."""
        if self.perceptual is not None:
            yield "perceptual", self.config.perceptual.weight, self.perceptual_gradient
        for term, weight in self._active("pixels", step):
            yield term.name, weight, with_gradient(term.compute)

    def _active(self, at: str, step: int) -> list[tuple[Term, float]]:
        """The further terms at the pixels or the latents that have a weight in this step."""
        weighted = [(term, term.weight(step)) for term in self.terms if term.at == at]
        return [(term, weight) for term, weight in weighted if weight]

    def perceptual_gradient(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean LPIPS and its gradient in the reconstruction, a few images at a time: they share nothing."""
        at_a_time = max(1, PERCEPTUAL_PIXELS // images[0, 0].numel())
        distances, gradients = [], []
        with record_function("perceptual"):
            for part, real in zip(reconstruction.split(at_a_time), images.split(at_a_time), strict=True):
                distance = self.perceptual(part, real).sum() / len(images)
                gradients += torch.autograd.grad(distance, part)
                distances.append(distance.detach())
            return torch.stack(distances).sum(), torch.cat(gradients)


def weighted_kl(config: KLConfig, kl: Tensor, step: int, dimensions: int) -> Tensor:
    """The KL's part of the loss in a step; `kl` in nats a pixel dimension, of which an image has `dimensions`.

    beta(step) KL (Higgins et al. 2017), where beta may rise from 0, linearly or as half a cosine, once or in each
    cycle (Bowman et al. 2016; Fu et al. 2019, "Cyclical Annealing Schedule"). With a capacity C(step), which rises
    linearly, beta |KL - C / D| (Burgess et al. 2018, eq. 8, with the mean over the batch inside).
    """
    since = step % config.cycle_steps if config.cycle_steps else step
    rise = ramp(since, config.warmup_steps)
    if config.warmup == "cosine":
        rise = 0.5 * (1 - math.cos(math.pi * rise))
    if config.capacity is not None:
        kl = (kl - config.capacity * ramp(step, config.capacity_steps) / dimensions).abs()
    return config.weight * rise * kl


def with_gradient(compute: Callable[[Tensor, Tensor], Tensor]) -> AtPixels:
    """A function that returns `compute(reconstruction, images)` and its gradient in the reconstruction."""

    def at_pixels(reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        value = compute(reconstruction, images)
        (gradient,) = torch.autograd.grad(value, reconstruction)
        return value.detach(), gradient

    return at_pixels
