"""`CodePrior`: an autoregressive model of the codes of a discrete autoencoder (van den Oord et al. 2017)."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ...networks.transformer import CodeTransformer


class CodePrior(ModelMixin, ConfigMixin):
    """p(codes | label) of grids of `height` x `width` codes, row by row; saved and loaded as diffusers' models are.

    codes: size of the code book. classes: how many labels there are; None: it knows no labels. autoencoder: the
    folder or hub id of the autoencoder that the codes are of, as its training named it.
    """

    @register_to_config
    def __init__(
        self,
        codes: int,
        height: int,
        width: int,
        classes: int | None = None,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        autoencoder: str = "",
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size: {hidden_size}; allowed: multiples of num_heads, {num_heads}")
        self.transformer = CodeTransformer(
            codes, height * width, classes or 1, hidden_size, num_layers, num_heads
        )

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Codes (B, h, w) and labels (B,), int64 -> logits (B, h, w, codes), of each code given those before it."""
        return self.transformer(codes.flatten(1), self._labels(len(codes), labels)).unflatten(
            1, codes.shape[1:]
        )

    def nll(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log p(codes | label) in nats a grid: (B,)."""
        logits = self(codes, labels).float()
        return (
            F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
            .view(len(codes), -1)
            .sum(1)
        )

    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`count` drawn grids of codes, (count, h, w) int64, of the labels (count,) where the prior knows any.

        generator: of torch, on the CPU. temperature: below 1 the likely codes become likelier.
        """
        drawn = self.transformer.draw(self._labels(count, labels), temperature, generator)
        return drawn.view(count, self.config.height, self.config.width)

    def _labels(self, count: int, labels: Tensor | None) -> Tensor:
        if (labels is None) != (self.config.classes is None):
            known = f"numbers below {self.config.classes}" if self.config.classes else "none, it knows none"
            raise ValueError(f"labels: {'none' if labels is None else 'given'}; allowed: {known}")
        if labels is None:
            return torch.zeros(count, dtype=torch.int64, device=self.device)
        return labels.to(self.device)
