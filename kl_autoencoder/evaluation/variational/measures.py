"""Choose the measures that suit a model, with Gaussian posteriors or a code book or neither, and take them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...networks.distributions import DiagonalGaussian
from ...networks.priors import PRIORS
from .bounds import Likelihood, elbo, importance_bound, importance_weights, posterior_of
from .codes import code_counts, perplexity, usage
from .discrepancy import squared_mmd
from .information import active_units, split_rate
from .likelihoods import best_log_scale, error

PIXELS_AT_ONCE = 2**20  # pixels in a batch
DRAWS = 50  # z ~ q(z|x) for each image, for the ELBO and the bound L_50


class Encoded(NamedTuple):
    """N images as encoded by a model, on the CPU.

    latents: (N, C, h, w), the posterior's mode. moments: (N, 2C, h, w), mean and logvar of a Gaussian posterior,
    else None. counts: (codes,), how often each code occurs, None without a code book.
    """

    latents: Tensor
    moments: Tensor | None = None
    counts: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """(N, C h w)."""
        return self.latents.flatten(1)

    @property
    def logvar(self) -> Tensor:
        """(N, C h w), of a Gaussian posterior alone."""
        return DiagonalGaussian(self.moments).logvar.flatten(1)

    def rate_of_values(self) -> Tensor | None:
        """KL of each latent value in nats, mean over the images: (C, h, w); None without a Gaussian posterior."""
        return None if self.moments is None else DiagonalGaussian(self.moments).kl_map().mean(0)


class Images(NamedTuple):
    """Images (N, C, H, W) in [-1, 1] on the CPU, and for a conditional model their classes (N,)."""

    images: Tensor
    labels: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """The number of images with PIXELS_AT_ONCE pixels together, from 1 to 256."""
        return min(256, max(1, PIXELS_AT_ONCE // self.images[0, 0].numel()))

    def batches(self, device: torch.device, done: Callable[[int], None] = lambda count: None):
        """Yield batches (images, {"labels": labels} or {}) on `device`.

        `done` is called with the size of each batch after it was used.
        """
        labels = [None] * len(self.images) if self.labels is None else self.labels
        for start in range(0, len(self.images), self.batch_size):
            images = self.images[start : start + self.batch_size].to(device)
            of_batch = labels[start : start + self.batch_size]
            yield images, {} if self.labels is None else {"labels": of_batch.to(device)}
            done(len(images))


@torch.no_grad()
def encode(model: Any, data: Images, done: Callable[[int], None] = lambda count: None) -> Encoded:
    """Encode all images in batches; `done` is called with the size of each."""
    latents, moments, counts = [], [], 0
    for images, labels in data.batches(model.device, done):
        posterior = model.encode(images, **labels).latent_dist
        latents.append(posterior.mode().float().cpu())
        if isinstance(posterior, DiagonalGaussian):
            moments.append(posterior.parameters.float().cpu())
        if is_discrete(model):
            counts = counts + code_counts(model.encode_indices(images, **labels), model.codes)
    return Encoded(
        torch.cat(latents), torch.cat(moments) if moments else None, counts if is_discrete(model) else None
    )


def is_discrete(model: Any) -> bool:
    return getattr(model, "is_discrete", False)  # a KLAutoencoder never is


def prior_of(model: Any) -> str:
    """The name of the prior in `PRIORS`: that of an adversarial bottleneck, "normal" for any other."""
    return (model.config.get("bottleneck") or {}).get("prior", "normal")


def measure(
    model: Any,
    data: Images,
    encoded: Encoded,
    likelihood: str,
    seed: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, float | int | str]:
    """Take the measures that suit the model: name -> value, likelihoods and information in nats per image.

    encoded: of `encode`. likelihood: a kind of `log_likelihood`. done: called with the size of each batch. For
    every model: images (their number) and mse (of reconstructions from the mode, in [-1, 1]). With a Gaussian
    posterior: the measures of `bounds` and `information`. With a code book: codes, perplexity and usage. With other
    latents: those of `discrepancy`.
    """
    found = {"images": len(data.images), "mse": _mse(model, data, encoded)}
    if encoded.moments is not None:
        found |= bounds(model, data, likelihood, seed, done) | information(encoded, seed)
    elif encoded.counts is not None:
        counts = encoded.counts
        found |= {"codes": len(counts), "perplexity": perplexity(counts), "usage": usage(counts)}
    else:
        found |= discrepancy(encoded.latents, prior_of(model), seed)
    return found


@torch.no_grad()
def _mse(model: Any, data: Images, encoded: Encoded) -> float:
    total, batches = 0.0, encoded.latents.split(data.batch_size)
    for (images, labels), z in zip(data.batches(model.device), batches, strict=True):
        decoded = model.decode(z.to(images), **labels).sample
        total += float((decoded.double() - images.double()).square().sum())
    return total / data.images.numel()


@torch.no_grad()
def bounds(
    model: Any, data: Images, kind: str, seed: int = 0, done: Callable[[int], None] = lambda count: None
) -> dict[str, float | str]:
    """The ELBO, its parts distortion and rate, and the bound L_50: means over the images, in nats.

    A Gaussian or Laplace likelihood has the scale of greatest likelihood for draws from the posteriors of these
    images; log_scale is returned too.
    """
    likelihood = Likelihood(kind, _best_log_scale(model, data, kind, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    elbos, rates, tighter = [], [], []
    for images, labels in data.batches(model.device, done):
        weights = importance_weights(
            model, images, likelihood, DRAWS, generator, **labels, at_once=data.batch_size
        )
        kl = posterior_of(model, images, **labels).kl().cpu()
        elbos.append(elbo(weights, kl))
        rates.append(kl)
        tighter.append(importance_bound(weights.log_weights, DRAWS))
    bound, rate, tight = (float(torch.cat(values).mean()) for values in (elbos, rates, tighter))
    scale = {} if likelihood.log_scale is None else {"log_scale": likelihood.log_scale}
    split = {"distortion": -bound - rate, "rate": rate, "elbo": bound, f"iwae_{DRAWS}": tight}
    return {"likelihood": kind, **scale, **split}


def _best_log_scale(model: Any, data: Images, kind: str, seed: int) -> float | None:
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for images, labels in data.batches(model.device):
        z = model.encode(images, **labels).latent_dist.sample(generator)
        total += len(images) * error(kind, images, model.decode(z, **labels).sample)
    return best_log_scale(kind, max(total / len(data.images), 1e-12))


def information(encoded: Encoded, seed: int = 0) -> dict[str, float | int]:
    """The number of active units and of all units, and the two parts of the rate (`split_rate`)."""
    generator = torch.Generator().manual_seed(seed)
    active = active_units(encoded.mean)
    units = {"active_units": int(active.sum()), "units": len(active)}
    return units | split_rate(encoded.mean, encoded.logvar, generator)


def discrepancy(latents: Tensor, prior: str, seed: int = 0) -> dict[str, float | str]:
    """prior: its name. mmd: the squared MMD between latents and prior, both vectors of C channels.

    latents: (N, C, h, w). N random positions of all N h w are compared with N draws from the prior.
    """
    generator, count = torch.Generator().manual_seed(seed), len(latents)
    positions = latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = positions[torch.randperm(len(positions), generator=generator)[:count]]
    draws = PRIORS[prior].sample(count, latents.shape[1], generator)
    return {"prior": prior, "mmd": squared_mmd(chosen, draws)}
