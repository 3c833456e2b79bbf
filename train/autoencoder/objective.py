"""The objective of the autoencoder, and its gradient.

It is the negative ELBO per pixel dimension, with further terms. With D = C*H*W values an image,

    loss = (nll + sum_i w_i penalty_i) / D  +  w LPIPS  +  sum_j w_j term_j  +  w_adv adaptive adversarial

averaged over the batch: nll of the likelihood (likelihoods.py), the penalties of the bottleneck (the KL of the
posterior, weighted by `loss.kl.weight`), LPIPS (kl_autoencoder.evaluation.metrics), the terms of `loss.terms`, and
the adversarial term (adversary.py). `kl.weight: 1e-6` means the same as in the configs of latent diffusion, at any
resolution: they divide nll and KL by the batch size and not by D, which leaves their ratio as it is. `gaussian`
with `kl.weight: 1` is the textbook VAE in nats per dimension (Kingma & Welling 2013, eq. 3).
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from kl_autoencoder.evaluation.metrics import LPIPS

from ..config import KLConfig, LossConfig
from ..loop.schedules import ramp
from ..parts import Draws, Term
from .adversarial.adversary import Adversary
from .likelihoods import reconstruction_nll
from .model import Reconstruction
from .windows import draw_windows

# LPIPS takes at most so many pixels at a time: it holds about 250 MB of VGG features for an image of 256x256.
PERCEPTUAL_PIXELS = 4 * 256 * 256
# (reconstruction, images), both (B, C, H, W) -> a scalar, and its gradient with respect to the reconstruction
AtPixels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Objective:
    """The weighted sum of all terms, and its gradient. Runs without LPIPS or discriminator have None for these."""

    def __init__(
        self, config: LossConfig, perceptual: LPIPS | None, terms: list[Term], adversary: Adversary | None
    ):
        self.config, self.perceptual, self.terms, self.adversary = config, perceptual, terms, adversary

    def __call__(
        self, step: int, output: Reconstruction, draws: Draws | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return a scalar to call `backward` on, name -> term to log, and the detached reconstruction.

        The scalar has the gradient of the objective, but not its value; that is the term `loss`. `step` counts from
        0. draws: random numbers for the windows that LPIPS compares; without them it compares whole images.

        First the gradient with respect to the reconstruction is summed term by term, and the graph of one network
        (LPIPS, discriminator) is freed before the next is built. Then this gradient goes back through the
        autoencoder once. The adaptive weight compares gradients that are there by then, so it needs no second pass
        through LPIPS or the discriminator.
        """
        images = output.targets
        reconstruction = output.images.detach().float().requires_grad_()
        with record_function("autoencoder"):
            nll = self._nll(reconstruction, images, output.log_scale)
            penalties = {name: penalty.mean() for name, penalty in output.code.penalties.items()}
            penalty = sum(
                self._weight_penalty(name, value, step, images[0].numel())
                for name, value in penalties.items()
            )
            (gradient,) = torch.autograd.grad(nll, reconstruction)
        terms, loss = {"reconstruction": nll, **penalties}, nll + penalty
        for name, weight, at_pixels in self._pixel_terms(step, draws):
            value, more = at_pixels(reconstruction, images)
            gradient = gradient + weight * more
            terms[name], loss = value, loss + weight * value
        if self.adversary is not None and self.adversary.weight(step) > 0:
            with record_function("discriminator"):
                more, value, found = self.adversary.gradient(step, reconstruction, output.features, gradient)
                gradient, loss = gradient + more, loss + value
                terms |= found
        with record_function("autoencoder"):
            # a scalar whose gradient with respect to `output.images` is `gradient`
            surrogate = (output.images.float() * gradient.detach()).sum() + penalty
            for term, weight in self._active_terms("latents", step):
                value = term.compute(output.learned.get(term.name, output.code.z), output.encoded)
                surrogate = surrogate + weight * value
                terms[term.name], loss = value, loss + weight * value
            if output.log_scale is not None:
                surrogate = surrogate + self._nll(reconstruction.detach(), images, output.log_scale)
                terms["log_scale"] = output.log_scale
        return surrogate, {"loss": loss, **terms}, reconstruction.detach()

    def _nll(self, reconstruction: Tensor, images: Tensor, log_scale: Tensor | None) -> Tensor:
        return reconstruction_nll(self.config.reconstruction, reconstruction, images, log_scale).mean()

    def _weight_penalty(self, name: str, penalty: Tensor, step: int, dimensions: int) -> Tensor:
        """Weight a mean penalty of the bottleneck: the KL by `loss.kl`; the bottleneck has weighted all others."""
        return weighted_kl(self.config.kl, penalty, step, dimensions) if name == "kl" else penalty

    def _pixel_terms(self, step: int, draws: Draws | None) -> Iterator[tuple[str, float, AtPixels]]:
        """Yield name, weight and function of each term at the pixels, except likelihood and adversarial term."""
        if self.perceptual is not None:
            yield "perceptual", self.config.perceptual.weight, partial(self.perceptual_gradient, draws=draws)
        for term, weight in self._active_terms("pixels", step):
            yield term.name, weight, with_gradient(term.compute)

    def _active_terms(self, at: str, step: int) -> list[tuple[Term, float]]:
        """The terms of `loss.terms` at the pixels or the latents (`at`) with their weights in `step`, if not 0."""
        weighted = [(term, term.weight(step)) for term in self.terms if term.at == at]
        return [(term, weight) for term, weight in weighted if weight]

    def perceptual_gradient(
        self, reconstruction: Tensor, images: Tensor, draws: Draws | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean LPIPS of the batch, and its gradient with respect to the reconstruction, (B, C, H, W).

        Images do not depend on one another, so a few are computed at a time (`PERCEPTUAL_PIXELS`), to save memory.

        draws: for windows at random places and in random sizes (windows.py); without them whole images are
        compared.
        """
        at_a_time = max(1, PERCEPTUAL_PIXELS // images[0, 0].numel())
        distances, gradients = [], []
        windows = draw_windows(self.config.perceptual, images, draws)
        parts = (x.split(at_a_time) for x in (reconstruction, images, windows))
        with record_function("perceptual"):
            for part, real, window in zip(*parts, strict=True):
                distance = self.perceptual(window.cut(part), window.cut(real)).sum() / len(images)
                gradients += torch.autograd.grad(distance, part)
                distances.append(distance.detach())
            return torch.stack(distances).sum(), torch.cat(gradients)


def weighted_kl(config: KLConfig, kl: Tensor, step: int, dimensions: int) -> Tensor:
    """The weighted KL in a step, which counts from 0: beta(step) KL (Higgins et al. 2017).

    kl: the mean over the batch, in nats per pixel dimension. dimensions: D = C*H*W of an image. beta may rise from
    0, linearly or as half a cosine, once or in each cycle (Bowman et al. 2016; Fu et al. 2019, "Cyclical Annealing
    Schedule"). With a capacity C(step) in nats an image, which rises linearly, it is beta(step) |KL - C / D|
    (Burgess et al. 2018, eq. 8, with the absolute value of the batch's mean).
    """
    since = step % config.cycle_steps if config.cycle_steps else step
    rise = ramp(since, config.warmup_steps)
    if config.warmup == "cosine":
        rise = 0.5 * (1 - math.cos(math.pi * rise))
    if config.capacity is not None:
        kl = (kl - config.capacity * ramp(step, config.capacity_steps) / dimensions).abs()
    return config.weight * rise * kl


def with_gradient(compute: Callable[[Tensor, Tensor], Tensor]) -> AtPixels:
    """Make a function that returns the scalar `compute(reconstruction, images)` and its gradient in the former."""

    def at_pixels(reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        value = compute(reconstruction, images)
        (gradient,) = torch.autograd.grad(value, reconstruction)
        return value.detach(), gradient

    return at_pixels
