"""Grids of decoded images: the manifold of two latents, and traversals of each latent."""

from collections.abc import Callable, Iterable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .style import axes, titled

REACH = 3.0  # standard deviations to either side in a traversal
MOST_ROWS = 12  # latents in a figure of traversals
INCHES = 0.62  # side of a cell

Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> images (B, C, H, W) in [-1, 1], on the CPU


def manifold(decode: Decode, side: int = 20) -> Figure:
    """Draw the decoded images of two latents on a grid of side x side (Kingma & Welling 2013, figure 4).

    The latents are equally spaced quantiles of the normal prior, so that each image stands for an equal share of
    it.
    """
    places = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side).float()
    y, x = torch.meshgrid(places.flip(0), places, indexing="ij")
    images = decode(torch.stack((x, y), dim=-1).view(-1, 2, 1, 1))
    figure, ax = axes(7.2, 7.2)
    pitch = _mosaic(ax, images.unflatten(0, (side, side)))
    near = range(0, side // 2, max(1, side // 8))
    ticks = [*near, *(side - 1 - i for i in reversed(near))]  # symmetric about 0
    ax.set_xticks(_centres(ticks, images.shape[-1], pitch[1]), [f"{places[i]:+.1f}" for i in ticks])
    ax.set_yticks(
        _centres(ticks, images.shape[-2], pitch[0]), [f"{places[side - 1 - i]:+.1f}" for i in ticks]
    )
    titled(ax, "What each place of the latent plane decodes to", "$z_0$", "$z_1$")
    return figure


def most_informative(rates: Tensor, most: int = MOST_ROWS) -> list[int]:
    """The `most` channels of largest rate, in falling order. rates: (C, h, w), nats of each latent value."""
    return rates.sum((1, 2)).argsort(descending=True)[:most].tolist()


def traversals(
    decode: Decode, start: Tensor, channels: Sequence[int], mean: Tensor, std: Tensor, rates: Tensor | None = None,
    steps: int = 7,
) -> Figure:  # fmt: skip
    """Draw one row for each of `channels`: this latent moves from -3 to 3 standard deviations, the others stay.

    start: (C, h, w), the latents that stay. A latent of one position takes the values mean + t std; a channel of a
    spatial latent becomes start + t std at all positions. mean, std: (C,). rates: (C,), nats, printed at the rows.
    steps: images in a row.
    """
    moves = torch.linspace(-REACH, REACH, steps)
    single = start[0].numel() == 1
    rows = []
    for channel in channels:
        z = start.expand(steps, *start.shape).clone()
        move = (moves * std[channel])[:, None, None]
        z[:, channel] = mean[channel] + move if single else z[:, channel] + move
        rows.append(z)
    images = decode(torch.cat(rows)).unflatten(0, (len(rows), steps))
    figure, ax = axes(INCHES * steps + 1.4, INCHES * len(rows) + 0.9)
    pitch = _mosaic(ax, images)
    values = [f"{move:+.2g}" if move else "0" for move in moves.tolist()]
    ax.set_xticks(_centres(range(steps), images.shape[-1], pitch[1]), values)
    names = [f"$z_{{{c}}}${'' if rates is None else _nats(float(rates[c]))}" for c in channels]
    ax.set_yticks(_centres(range(len(rows)), images.shape[-2], pitch[0]), names)
    titled(ax, "One latent at a time, in standard deviations")
    return figure


def _nats(rate: float) -> str:
    return f"  {rate:.2f} nats" if rate < 100 else f"  {rate:,.0f} nats"


def _centres(cells: Iterable[int], length: int, pitch: int) -> list[float]:
    return [cell * pitch + length / 2 - 0.5 for cell in cells]


def _mosaic(ax: Axes, images: Tensor) -> tuple[int, int]:
    """Draw images (R, K, C, H, W) in [-1, 1] as R rows of K; return the pixels from cell to cell, down and across.

    Raises ValueError for images that are neither gray nor RGB.
    """
    rows, columns, channels, height, width = images.shape
    gap = max(1, width // 16)
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels; allowed in pictures: 1 (grey) or 3 (RGB)")
    sheet = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    shown = ((images.float().clamp(-1, 1) + 1) / 2).expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2)
    for i in range(rows):
        for j in range(columns):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y : y + height, x : x + width] = shown[i, j]
    ax.imshow(sheet.numpy(), interpolation="nearest")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return height + gap, width + gap
