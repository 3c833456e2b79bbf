"""Lower bounds of log p(x) from a model's posterior: ELBO (Kingma & Welling 2013), IWAE (Burda et al. 2016)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...networks.distributions import DiagonalGaussian
from .likelihoods import log_likelihood, log_mean_exp


class Likelihood(NamedTuple):
    """log p(x|z) as a function of images and decoded latents; kind and log_scale as in `log_likelihood`."""

    kind: str
    log_scale: float | None = None

    def __call__(self, images: Tensor, decoded: Tensor) -> Tensor:
        return log_likelihood(self.kind, images, decoded, self.log_scale)


class Weights(NamedTuple):
    """Logarithmic importance weights of K draws z ~ q(z|x) for each of B images.

    Both terms are (K, B), float64, in nats per image. log_likelihood: log p(x|z). log_ratio: log p(z) - log q(z|x).
    """

    log_likelihood: Tensor
    log_ratio: Tensor

    @property
    def log_weights(self) -> Tensor:
        return self.log_likelihood + self.log_ratio


def posterior_of(model: Any, images: Tensor, labels: Tensor | None = None) -> DiagonalGaussian:
    """Encode images (B, C, H, W) to the posterior q(z|x) in float64; labels (B,) are for a conditional model.

    Raises ValueError if the posterior is not Gaussian, as that of a plain autoencoder.
    """
    given = {} if labels is None else {"labels": labels}
    posterior = model.encode(images, **given).latent_dist
    if not isinstance(posterior, DiagonalGaussian):
        raise ValueError("the model has no Gaussian posterior; allowed: models with a KL bottleneck")
    return DiagonalGaussian(posterior.parameters.double())


@torch.no_grad()
def importance_weights(
    model: Any,
    images: Tensor,
    likelihood: Callable[[Tensor, Tensor], Tensor],
    samples: int,
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
    at_once: int = 256,
) -> Weights:
    """Draw `samples` latents for each image from q(z|x) and compute their importance weights (samples, B).

    model: has encode(images).latent_dist and decode(z).sample. images: (B, C, H, W) in [-1, 1], on the model's
    device and in its type. likelihood: log p(x|z) from images and decoded latents. generator: on the CPU, so that
    draws are the same on every device. labels: (B,), for a conditional model. at_once: images decoded at a time.
    Raises the errors of `posterior_of`.
    """
    posterior = posterior_of(model, images, labels)
    prior = DiagonalGaussian(torch.zeros_like(posterior.parameters[:1]))
    found = []
    for count in _chunks(samples, max(1, at_once // len(images))):
        # one call of randn per draw, so that the noise does not depend on `at_once`
        noise = [torch.randn(posterior.mean.shape, generator=generator).double() for _ in range(count)]
        z = posterior.mean + posterior.std * torch.stack(noise).to(images.device)
        given = {} if labels is None else {"labels": labels.repeat(count)}
        decoded = torch.cat(
            [
                model.decode(part, **{key: value[rows] for key, value in given.items()}).sample
                for part, rows in _parts(z.flatten(0, 1).to(images.dtype), at_once)
            ]
        )
        every = (2, 3, 4)
        log_ratio = posterior.nll(z, every) - prior.nll(z, every)
        found.append((likelihood(images, decoded.unflatten(0, (count, -1))), log_ratio))
    return Weights(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def elbo(weights: Weights, kl: Tensor) -> Tensor:
    """E_q[log p(x|z)] - KL(q(z|x) || p(z)): (B,). The expectation is the mean over draws, `kl` (B,) is exact."""
    return weights.log_likelihood.mean(0) - kl.to(weights.log_likelihood)


def importance_bound(log_weights: Tensor, k: int) -> Tensor:
    """L_k = E[log mean of k weights] (Burda et al. 2016, section 3): (K, B) -> (B,).

    The expectation is the mean over consecutive groups of k draws. L_1 is an estimate of the ELBO; in expectation
    L_k grows with k and tends to log p(x). Raises ValueError unless K is a multiple of k.
    """
    if k < 1 or len(log_weights) % k:
        raise ValueError(f"k: {k}; allowed: a divisor of the number of draws, {len(log_weights)}")
    return log_mean_exp(log_weights.unflatten(0, (-1, k)), 1).mean(0)


def _chunks(total: int, size: int) -> list[int]:
    whole, rest = divmod(total, size)
    return [size] * whole + [rest] * (rest > 0)


def _parts(z: Tensor, size: int) -> list[tuple[Tensor, slice]]:
    rows = [slice(start, start + size) for start in range(0, len(z), size)]
    return [(z[part], part) for part in rows]
