"""The learned entropy model: small integer networks that predict latents from those coded before them.

Channels are coded one after the other (ELIC, He et al. 2022), each in two passes over a checkerboard, first the
places `.` and then the places `#` (He et al. 2021). Each pass has a network of its own. It sees a neighbourhood of
5x5 places of all earlier channels and, in the second pass, of the places `.` of its own channel:

    . # . # .        pass 2c predicts the . of channel c from channels 0 to c-1,
    # . # . #        pass 2c+1 predicts its # from channels 0 to c-1 and its own .
    . # . # .

Encoder and decoder must agree on each prediction to the last bit (Ballé et al. 2019, "Integer Networks for Data
Compression with Latent-Variable Models"). Weights, biases and activations are therefore whole numbers, stored in
float32, in fixed units: activations 2 ** -5, weights 2 ** -7, sums 2 ** -12. As long as sums stay below 2 ** 23,
every product and partial sum is exact, in whatever order they are added. Training uses the same rounded numbers,
with straight-through gradients.
"""

import json

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


class ContextNetwork(nn.Module):
    """The networks of all passes over latents with `channels` channels; each network has `width` features.

    middles: set latents to the middles of their steps when decoding, for an autoencoder that was trained with
    those, instead of to the values that the network expects within the steps.
    """

    def __init__(self, channels: int, width: int = 32, middles: bool = False):
        super().__init__()
        self.channels, self.width, self.middles = channels, width, middles
        self.passes = nn.ModuleList(
            PassNetwork(number // 2 + number % 2, width) for number in range(2 * channels)
        )

    def predict(self, number: int, context: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Predict means, in units of 2 ** -6 deviations, and scales, as numbers of tables, for pass `number`.

        context: latents (B, C, h, w) in units of 2 ** -5 deviations, from channel 0 to at least that of the pass;
        what the pass may not see is ignored. quality: (B,). Both results are (B, h, w), at every place, whole
        numbers in float32; scales are not yet clamped to SCALES.
        """
        channel, second = divmod(number, 2)
        b, _, h, w = context.shape
        seen = [context[:, :channel], (UNIT_STEP - quality.view(b, 1, 1, 1)).expand(b, 1, h, w)]
        if second:
            seen.insert(1, context[:, channel : channel + 1] * checkerboard(h, w, context.device))
        x = torch.cat(seen, dim=1).contiguous(memory_format=torch.channels_last)
        mean, scale = self.passes[number](x).unbind(1)
        mean = rounded(mean / (1 << (SUM_BITS - MEAN_BITS)))
        # the network's sum is half the log2 of the scale in deviations; here in sixteenths of an octave, of steps
        sixteenths = rounded(scale / (1 << (SUM_BITS - 5))) - (UNIT_STEP - quality.view(b, 1, 1))
        return mean, rounded((sixteenths - SMALLEST * A_HALVING) / 4)

    def bits(self, latents: Tensor, quality: Tensor) -> Tensor:
        """Differentiable bits of latents at each place of each pass: (B, 2C, h, w), 0 where a pass codes nothing.

        latents: (B, C, h, w) in steps, whole numbers or with noise in place of rounding. quality: (B,).
        """
        b, _, h, w = latents.shape
        step = 2 ** ((UNIT_STEP - quality) / A_HALVING)
        in_deviations = latents * step.view(b, 1, 1, 1) * (1 << ACTIVATION_BITS)
        context = rounded(in_deviations.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION))
        first = checkerboard(h, w, latents.device)
        found = []
        for number in range(2 * self.channels):
            mean, scale = self.predict(number, context, quality)
            mean = mean / (1 << MEAN_BITS) / step.view(b, 1, 1)
            scale = 2 ** (scale.clamp(0, SCALES - 1) / 4 + SMALLEST)
            coded = 1 - first if number % 2 else first
            found.append(coded * logistic_bits(latents[:, number // 2] - mean, scale))
        return torch.stack(found, dim=1)

    def forward(self, latents: Tensor, quality: Tensor) -> Tensor:
        """`bits`, computed in float32 even under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.bits(latents.float(), quality.float())

    def to_json_string(self) -> str:
        """The network's class and sizes, as checkpoints store them."""
        return json.dumps(
            {"_class_name": type(self).__name__, "channels": self.channels, "width": self.width}
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


def checkerboard(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(h, w): 1 at the places of the first pass, which include the top left one, and 0 at those of the second."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return ((rows[:, None] + columns) % 2 == 0).float()


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
