"""Choose the pictures that suit a model: by the number of its latents, its bottleneck and its training log."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..variational.codes import perplexity
from ..variational.measures import Encoded, Images
from . import grids, plots


def pictures(
    model: Any,
    data: Images,
    encoded: Encoded,
    classes: Sequence[int] | None,
    names: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield (file name, function that draws the figure) for each picture that suits the model.

    classes: (N,), the class numbers of the images, which colour the latents, or None. names: names of the classes,
    by number. records: lines of the run's metrics.jsonl, may be empty.
    """
    latents, decode = encoded.latents, decoder(model, data)
    single = latents[0, 0].numel() == 1
    if single and latents.shape[1] == 2 and _has_normal_prior(model, encoded):
        yield "manifold.png", lambda: grids.manifold(decode)
    if encoded.counts is None:
        yield "traversals.png", lambda: _traversals(decode, encoded)
    else:
        yield "codes.png", lambda: plots.code_usage(encoded.counts, perplexity(encoded.counts))
    if len(latents) > 2:
        yield "latents.png", lambda: plots.latents_by_class(encoded.mean, classes, names)
    if any("train/kl" in record for record in records):
        yield "training.png", lambda: plots.elbo_over_training(records)


def _has_normal_prior(model: Any, encoded: Encoded) -> bool:
    """Whether the model's prior is normal, by a KL or an adversarial bottleneck; a plain autoencoder has none."""
    bottleneck = model.config.get("bottleneck") or {}
    return encoded.moments is not None or bottleneck.get("prior") == "normal"


def _traversals(decode: grids.Decode, encoded: Encoded) -> Figure:
    """Draw traversals, around the first image's latents if these are spatial.

    Latents of one position start from the prior's mean if they have a Gaussian posterior, else from their own mean.
    """
    latents, rates = encoded.latents, encoded.rate_of_values()
    values = latents.transpose(0, 1).flatten(1)  # (C, N h w)
    mean, std = values.mean(1), values.std(1)
    single = latents[0, 0].numel() == 1
    start = mean[:, None, None] if single else latents[0]
    if rates is not None and single:  # mean and deviation of the prior N(0, I)
        start, mean, std = torch.zeros_like(start), torch.zeros_like(mean), torch.ones_like(std)
    order = grids.most_informative(values.var(1)[:, None, None] if rates is None else rates)
    return grids.traversals(decode, start, order, mean, std, None if rates is None else rates.sum((1, 2)))


def decoder(model: Any, data: Images) -> grids.Decode:
    """Return the function latents -> images, both on the CPU; a conditional model gets the first image's class."""

    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        images = []
        for part in z.split(data.batch_size):
            given = (
                {} if data.labels is None else {"labels": data.labels[:1].expand(len(part)).to(model.device)}
            )
            images.append(model.decode(part.to(model.device, model.dtype), **given).sample.float().cpu())
        return torch.cat(images)

    return decode
