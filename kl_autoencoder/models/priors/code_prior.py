"""`CodePrior`: an autoregressive model of the codes of a discrete autoencoder (van den Oord et al. 2017)."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ...networks.transformer import CodeTransformer


class CodePrior(ModelMixin, ConfigMixin):
    """p(codes | label) of grids of `height` x `width` codes, in row order; saved and loaded like diffusers' models.

    codes: size of the code book. classes: number of labels; None: a prior without labels. hidden_size, num_layers,
    num_heads: of the transformer. autoencoder: folder or hub id of the autoencoder of the codes, as given in
    training.

    Raises ValueError if hidden_size is not a multiple of num_heads.
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
        """Codes (B, h, w) and labels (B,), int64 -> logits (B, h, w, codes) of each code given those before it."""
        return self.transformer(codes.flatten(1), self._labels(len(codes), labels)).unflatten(
            1, codes.shape[1:]
        )

    def nll(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Codes (B, h, w), labels (B,) -> -log p(codes | label) in nats, summed over each grid: (B,)."""
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
        """Draw `count` grids of codes, (count, h, w) int64, of labels (count,), int64, if the prior has labels.

        temperature: divides the logits; below 1 likely codes become likelier. generator: on the CPU. Raises
        ValueError if labels are missing, or given to a prior without labels.
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
