"""Fully connected encoder and decoder, for small images and few latents (Kingma & Welling 2013)."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .conditions import ClassCondition


def hidden_layers(widths: Sequence[int], condition: ClassCondition | None) -> nn.ModuleList:
    """Return linear layers from each of `widths` to the next, and register them with `condition`, if any."""
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    if condition is not None:
        for layer in layers:
            condition.add(layer.out_features)
    return nn.ModuleList(layers)


def run_layers(
    layers: nn.ModuleList, x: Tensor, labels: Tensor | None, condition: ClassCondition | None
) -> Tensor:
    """(B, first width) -> (B, last width): for each layer linear, modulation if there is a condition, ReLU."""
    for number, layer in enumerate(layers):
        x = layer(x)
        if condition is not None:
            x = condition.modulate(number, x, labels)
        x = x.relu()
    return x


class MLPEncoder(nn.Module):
    """Images (B, C, H, W) of one size -> h (B, channels, 1, 1).

    shape: (C, H, W). hidden: widths of the hidden layers, with ReLU. classes: number of classes of a conditional
    encoder; 0: `labels` are ignored.
    """

    def __init__(self, shape: tuple[int, int, int], hidden: Sequence[int], channels: int, classes: int = 0):
        super().__init__()
        values = shape[0] * shape[1] * shape[2]
        self.condition = ClassCondition(classes) if classes else None
        self.hidden = hidden_layers([values, *hidden], self.condition)
        self.conv_out = nn.Linear([values, *hidden][-1], channels)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = run_layers(self.hidden, x.flatten(1), labels, self.condition)
        return self.conv_out(x)[:, :, None, None]


class MLPDecoder(nn.Module):
    """Latents (B, channels, 1, 1) -> images (B, *shape): the mirror image of `MLPEncoder`, with its arguments."""

    def __init__(self, channels: int, hidden: Sequence[int], shape: tuple[int, int, int], classes: int = 0):
        super().__init__()
        widths = [channels, *reversed(hidden)]
        self.condition = ClassCondition(classes) if classes else None
        self.hidden = hidden_layers(widths, self.condition)
        values = shape[0] * shape[1] * shape[2]
        self.conv_out = nn.Sequential(nn.Linear(widths[-1], values), nn.Unflatten(1, shape))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.conv_out(self.features(z, labels))

    def features(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents -> the input of `conv_out`, (B, last width)."""
        return run_layers(self.hidden, z.flatten(1), labels, self.condition)
