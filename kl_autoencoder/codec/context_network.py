"""The learned entropy model: small integer networks that predict latents from those coded before them.

Channels are coded one after the other (ELIC, He et al. 2022), each in passes over ever finer grids. Each pass has a
network of its own. It sees a neighbourhood of 5x5 places of all earlier channels and of those places of its own
channel that are coded already. Each digit is the number of the first grid that has the place:

    0 4 2 4 0        Most channels are coded in two passes over a checkerboard (He et al. 2021), first the places
    4 3 4 3 4        0 to 3, which see nothing of their own channel, then 4. The first channels, which have the
    2 4 1 4 2        most bits and little else to be predicted from, are coded in five: a sixteenth of the places
    4 3 4 3 4        sees nothing of its own channel, not half of them.
    0 4 2 4 0

Encoder and decoder must agree on each prediction to the last bit (Ballé et al. 2019, "Integer Networks for Data
Compression with Latent-Variable Models"). Weights, biases and activations are therefore whole numbers, stored in
float32, in fixed units: activations 2 ** -5, weights 2 ** -7, sums 2 ** -12. As long as sums stay below 2 ** 23,
every product and partial sum is exact, in whatever order they are added. Training uses the same rounded numbers,
with straight-through gradients.
"""

import json
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .steps import A_HALVING, UNIT_STEP
from .tables import SCALES, SMALLEST

ACTIVATION_BITS, WEIGHT_BITS = 5, 7
SUM_BITS = ACTIVATION_BITS + WEIGHT_BITS
LARGEST_ACTIVATION = 255  # in units of 2 ** -5: 8 deviations
LARGEST_SUM = 1 << 23  # sums must stay below this to be exact
MEAN_BITS = 6  # predicted means are in units of 2 ** -6 deviations
SIDE = 5  # side of the neighbourhood that a network sees
CHECKERBOARD, FINEST = 3, 4  # numbers of grids


class FixedPointConv(nn.Conv2d):
    """A convolution in whole numbers.

    Input in units of 2 ** -5; weights, which are rounded here, in units of 2 ** -7; bias and result of 2 ** -12.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = rounded(self.weight * (1 << WEIGHT_BITS))
        return F.conv2d(x, weight, rounded(self.bias * (1 << SUM_BITS)), padding=self.padding)

    @torch.no_grad()
    def largest_sum(self) -> float:
        """An upper bound of the magnitude of all partial sums."""
        weight, bias = (self.weight * (1 << WEIGHT_BITS)).round(), (self.bias * (1 << SUM_BITS)).round()
        return float((weight.abs().sum(dim=(1, 2, 3)) * LARGEST_ACTIVATION + bias.abs()).max())


class PassNetwork(nn.Module):
    """The network of one pass: context (B, channels + 1, h, w) -> sums (B, 2, h, w) of the mean and the scale.

    All are whole numbers. channels: visible channels; the one more is the quality.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.context = FixedPointConv(channels + 1, width, SIDE, padding=SIDE // 2)
        self.hidden = FixedPointConv(width, width, 1)
        self.out = FixedPointConv(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_activated(self.hidden(_activated(self.context(x)))))


class Places(NamedTuple):
    """What a pass codes: the places of one channel that are in the grid `after`, but not in the grid `before`.

    before: the grid of the channel's places that are coded already; None for none.
    """

    channel: int
    before: int | None
    after: int

    def mask(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """(h, w): 1 at these places, 0 elsewhere."""
        coded = grid(self.after, height, width, device)
        return coded if self.before is None else coded - grid(self.before, height, width, device)


class ContextNetwork(nn.Module):
    """The networks of all passes over latents with `channels` channels; each network has `width` features.

    five_passes: how many of the first channels are coded in five passes; the others are coded in two.
    middles: set latents to the middles of their steps when decoding, for an autoencoder that was trained with
    those, instead of to the values that the network expects within the steps.
    """

    def __init__(self, channels: int, width: int = 32, middles: bool = False, five_passes: int = 0):
        super().__init__()
        self.channels, self.width, self.middles, self.five_passes = channels, width, middles, five_passes
        self.places = [
            Places(channel, before, after)
            for channel in range(channels)
            for before, after in pairwise((None, *grids_of(channel < five_passes)))
        ]
        self.passes = nn.ModuleList(
            PassNetwork(at.channel + (at.before is not None), width) for at in self.places
        )

    def start_from(self, other: "ContextNetwork") -> None:
        """Copy the networks of another model, of the same width, for its channels.

        Passes that it does not have start from its network for the second half of the checkerboard.
        """
        theirs = {(at.channel, at.before): one for at, one in zip(other.places, other.passes, strict=True)}
        for at, mine in zip(self.places, self.passes, strict=True):
            if at.channel < other.channels:
                alike = theirs.get((at.channel, at.before), theirs[at.channel, CHECKERBOARD])
                mine.load_state_dict(alike.state_dict())

    def predict(self, number: int, context: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Predict means, in units of 2 ** -6 deviations, and scales, as numbers of tables, for pass `number`.

        context: latents (B, C, h, w) in units of 2 ** -5 deviations, from channel 0 to at least that of the pass;
        what the pass may not see is ignored. quality: (B,). Both results are (B, h, w), at every place, whole
        numbers in float32; scales are not yet clamped to SCALES.
        """
        channel, before, _ = self.places[number]
        b, _, h, w = context.shape
        seen = [context[:, :channel], (UNIT_STEP - quality.view(b, 1, 1, 1)).expand(b, 1, h, w)]
        if before is not None:
            seen.insert(1, context[:, channel : channel + 1] * grid(before, h, w, context.device))
        x = torch.cat(seen, dim=1).contiguous(memory_format=torch.channels_last)
        mean, scale = self.passes[number](x).unbind(1)
        mean = rounded(mean / (1 << (SUM_BITS - MEAN_BITS)))
        # the network's sum is half the log2 of the scale in deviations; here in sixteenths of an octave, of steps
        sixteenths = rounded(scale / (1 << (SUM_BITS - 5))) - (UNIT_STEP - quality.view(b, 1, 1))
        return mean, rounded((sixteenths - SMALLEST * A_HALVING) / 4)

    def bits(self, latents: Tensor, quality: Tensor) -> Tensor:
        """Differentiable bits of each place in each pass: (B, passes, h, w), 0 where a pass codes nothing.

        latents: (B, C, h, w) in steps, whole numbers or with noise in place of rounding. quality: (B,).
        """
        b, _, h, w = latents.shape
        step = 2 ** ((UNIT_STEP - quality) / A_HALVING)
        in_deviations = latents * step.view(b, 1, 1, 1) * (1 << ACTIVATION_BITS)
        context = rounded(in_deviations.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION))
        found = []
        for number, at in enumerate(self.places):
            mean, scale = self.predict(number, context, quality)
            mean = mean / (1 << MEAN_BITS) / step.view(b, 1, 1)
            scale = 2 ** (scale.clamp(0, SCALES - 1) / 4 + SMALLEST)
            found.append(at.mask(h, w, latents.device) * logistic_bits(latents[:, at.channel] - mean, scale))
        return torch.stack(found, dim=1)

    def forward(self, latents: Tensor, quality: Tensor) -> Tensor:
        """`bits`, computed in float32 even under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.bits(latents.float(), quality.float())

    def to_json_string(self) -> str:
        """The network's class and sizes, as checkpoints store them."""
        return json.dumps(
            {
                "_class_name": type(self).__name__,
                "channels": self.channels,
                "width": self.width,
                "five_passes": self.five_passes,
            }
        )

    def check_sums(self) -> None:
        """Raise ValueError if a sum could be too large to be exact."""
        for name, module in self.named_modules():
            if isinstance(module, FixedPointConv) and not module.largest_sum() < LARGEST_SUM:
                raise ValueError(
                    f"{name}: sums up to {module.largest_sum():.3g}; allowed: below {LARGEST_SUM:,}"
                )


def logistic_bits(difference: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the probability of [difference - 1/2, difference + 1/2] under a logistic distribution around 0.

    By F(a) - F(b) = F(a) F(-b) (1 - exp(b - a)), whose logarithm stays finite and has a gradient far from the mean.
    """
    above, below = (difference + 0.5) / scale, (difference - 0.5) / scale
    nats = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-1 / scale))
    return -nats / torch.log(torch.tensor(2.0))


def grids_of(five: bool) -> tuple[int, ...]:
    """The grids of a channel that is coded in five passes, or in two."""
    return (0, 1, 2, CHECKERBOARD, FINEST) if five else (CHECKERBOARD, FINEST)


def grid(number: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(h, w): 1 at the places of grid `number`, 0 elsewhere. Each grid doubles the one before, which it includes.

    Grids 0, 2 and 4 have every fourth, every second and every row and column, from the top left place on; grids 1
    and 3 have the middles of the squares between these places as well.
    """
    side = 4 >> (number // 2)
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device).expand(height, width)
    found = (rows % side == 0) & (columns % side == 0)
    if number % 2:
        found |= (rows % side == side // 2) & (columns % side == side // 2)
    return found.float()


class _Rounded(torch.autograd.Function):
    """Round to the nearest whole number, halves up, with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x + 0.5).floor_()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _Activated(torch.autograd.Function):
    """Sums in units of 2 ** -12 -> activations in units of 2 ** -5, clamped to 0 to 255; gradient of a clamp."""

    @staticmethod
    def forward(ctx, sums: Tensor) -> Tensor:
        activations = (sums * 2.0**-WEIGHT_BITS).add_(0.5).floor_()
        result = activations.clamp(0, LARGEST_ACTIVATION)
        ctx.save_for_backward(activations == result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return gradient.mul(2.0**-WEIGHT_BITS).mul_(inside)


rounded, _activated = _Rounded.apply, _Activated.apply
