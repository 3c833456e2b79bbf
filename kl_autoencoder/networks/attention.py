"""Single-head self-attention over an image, with the interface that diffusers' attention processors expect."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
Processor = Callable[["AttentionBlock", Tensor], Tensor]


class AttentionBlock(nn.Module):
    """GroupNorm, single-head self-attention over all positions, plus the input: (B, C, H, W) -> (B, C, H, W).

    channels: C. groups: of the GroupNorm.

    The attribute `processor` is None or one of diffusers' attention processors. A processor computes the block from
    its layers and from the members below, under "what processors use". Without a processor, or with one whose
    `own_attention` is true, the block computes `attend` (or `inference` computes the same in pieces).
    """

    # Makes diffusers rename query, key, value and proj_attn of old folders.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # diffusers has dropout there
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Identity()])
        self.scale = channels**-0.5
        self.processor: Processor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) if self.processor is None or self.is_own else self.processor(self, x)

    @property
    def is_own(self) -> bool:
        """Whether `attend` computes the block, and not a processor of somebody else."""
        return self.processor is None or getattr(self.processor, "own_attention", False)

    def attend(self, x: Tensor) -> Tensor:
        """Scaled dot-product attention over all positions, plus the input: (B, C, H, W) -> (B, C, H, W)."""
        b, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, 1, h * w, c)  # one head
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](mixed).view(b, h, w, c).permute(0, 3, 1, 2)

    # ---------------------------------------------------------------- what processors use

    heads = 1
    spatial_norm = norm_q = norm_k = norm_cross = None
    is_cross_attention = upcast_attention = upcast_softmax = fused_projections = False
    residual_connection, rescale_output_factor = True, 1.0

    def get_processor(self) -> Processor | None:
        return self.processor

    def set_processor(self, processor: Processor | None) -> None:
        self._modules.pop("processor", None)  # the previous processor, if it had weights
        self.processor = processor

    def fuse_projections(self, fuse: bool = True) -> None:
        """Add `to_qkv`, (C -> 3C), the concatenated projections that fused processors use; False removes it."""
        self.fused_projections = fuse
        if not fuse:
            self._modules.pop("to_qkv", None)
            return
        parts = (self.to_q, self.to_k, self.to_v)
        fused = nn.Linear(1, 1, device="meta")
        fused.in_features, fused.out_features = self.to_q.in_features, 3 * self.to_q.out_features
        for kind in ("weight", "bias"):
            joined = torch.cat([getattr(part, kind).detach() for part in parts])
            setattr(fused, kind, nn.Parameter(joined, getattr(self.to_q, kind).requires_grad))
        self.to_qkv = fused

    def prepare_attention_mask(self, mask: Tensor | None, *_, **__) -> Tensor | None:
        return mask

    def head_to_batch_dim(self, tokens: Tensor, *_, **__) -> Tensor:
        return tokens  # (B, H*W, C): there is one head

    batch_to_head_dim = head_to_batch_dim

    def get_attention_scores(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights: queries (B, N, C), keys (B, M, C) -> (B, N, M), summing to one over M."""
        scores = self.scale * (query @ key.mT)
        return (scores if mask is None else scores + mask).softmax(dim=-1)
