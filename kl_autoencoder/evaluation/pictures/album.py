"""Which pictures make sense of a model, by what its latents are."""

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
    """Yield (file name, what draws it) of each picture of a model that makes sense.

    classes: (N,), numbers of the images' classes, by which latents are coloured, or None; names: of these classes.
    records: the lines of the run's metrics.jsonl, or none.
    """
    latents, decode = encoded.latents, decoder(model, data)
    single = latents[0, 0].numel() == 1
    if single and latents.shape[1] == 2 and _is_normal(model, encoded):
        yield "manifold.png", lambda: grids.manifold(decode)
    if encoded.counts is None:
        yield "traversals.png", lambda: _traversals(decode, encoded)
    else:
        yield "codes.png", lambda: plots.code_usage(encoded.counts, perplexity(encoded.counts))
    if len(latents) > 2:
        yield "latents.png", lambda: plots.latents_by_class(encoded.mean, classes, names)
    if any("train/kl" in record for record in records):
        yield "training.png", lambda: plots.elbo_over_training(records)


def _is_normal(model: Any, encoded: Encoded) -> bool:
    """Whether latents were held to the normal distribution, as those of a plain autoencoder are not."""
    bottleneck = model.config.get("bottleneck") or {}
    return encoded.moments is not None or bottleneck.get("prior") == "normal"


def _traversals(decode: grids.Decode, encoded: Encoded) -> Figure:
    """Around the prior's mean, of latents of one position; around the first image, where they have more."""
    latents, rates = encoded.latents, encoded.rate_of_values()
    values = latents.transpose(0, 1).flatten(1)  # (C, N h w)
    mean, std = values.mean(1), values.std(1)
    single = latents[0, 0].numel() == 1
    start = mean[:, None, None] if single else latents[0]
    if rates is not None and single:  # the prior's own scale
        start, mean, std = torch.zeros_like(start), torch.zeros_like(mean), torch.ones_like(std)
    order = grids.most_informative(values.var(1)[:, None, None] if rates is None else rates)
    return grids.traversals(decode, start, order, mean, std, None if rates is None else rates.sum((1, 2)))


def decoder(model: Any, data: Images) -> grids.Decode:
    """Latents on the CPU -> images on the CPU; of a conditional model, of the first image's class."""

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
