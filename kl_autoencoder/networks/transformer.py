"""A causal transformer over the codes of an image: p(c_1 ... c_n) = prod p(c_i | c_1 ... c_(i-1), label).

A small GPT-2 (Radford et al. 2019): a norm before each branch, learned positions, weights drawn with a standard
deviation of 0.02, in the last layer of each branch divided by the square root of the number of branches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = tuple[Tensor, Tensor]  # keys and values of the previous positions, (B, heads, n, width / heads) each


class CausalAttention(nn.Module):
    """Attention of each position to itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """x (B, n, width) -> (B, n, width), and keys and values so far.

        With `past`, x is the one next position (n = 1).
        """
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.to_out(attended.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """Attention and a feed-forward layer of four times the width, each added to its input: (B, n, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        attended, past = self.attention(self.norm1(x), past)
        x = x + attended
        return x + self.feed_forward(self.norm2(x)), past


class CodeTransformer(nn.Module):
    """Logits of each code of a sequence, given the codes before it and a label.

    codes: size of the code book. length: codes in a sequence. labels: number of labels, 1 if there are none. width,
    layers, heads: of the transformer.
    """

    def __init__(self, codes: int, length: int, labels: int, width: int, layers: int, heads: int):
        super().__init__()
        self.start = nn.Embedding(labels, width)  # in place of a code before the first one
        self.code = nn.Embedding(codes, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, codes)
        self._initialise_weights(layers)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, n) and labels (B,), int64 -> logits (B, n, codes) of each code given those before it."""
        before = torch.cat([self.start(labels)[:, None], self.code(codes[:, :-1])], dim=1)
        x = before + self.position.weight[: codes.shape[1]]
        for block in self.blocks:
            x, _ = block(x)
        return self.to_logits(self.norm(x))

    @torch.no_grad()
    def draw(
        self, labels: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Labels (B,), int64 -> drawn codes (B, length), int64, one position after another.

        Keys and values of previous positions are kept, so that each position is computed once. temperature: divides
        the logits. generator: on the CPU, where codes are drawn whatever the model's device.
        """
        x, pasts, drawn = self.start(labels), [None] * len(self.blocks), []
        for position in self.position.weight:
            x = (x + position)[:, None]
            for i, block in enumerate(self.blocks):
                x, pasts[i] = block(x, pasts[i])
            logits = self.to_logits(self.norm(x))[:, 0].float() / temperature
            code = torch.multinomial(logits.softmax(dim=1).cpu(), 1, generator=generator)[:, 0]
            drawn.append(code.to(labels.device))
            x = self.code(drawn[-1])
        return torch.stack(drawn, dim=1)

    def _initialise_weights(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_last = name.endswith(("to_out.weight", "feed_forward.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if is_last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
