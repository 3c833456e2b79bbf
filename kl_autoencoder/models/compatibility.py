"""What makes diffusers and its pipelines take our class for an AutoencoderKL in all that they look at."""

from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

from ..networks.attention import AttentionBlock


class OwnAttention(AttnProcessor2_0):
    """The `.processor` of an AttentionBlock that is computed by the block itself, whole or in pieces.

    Pipelines ask for its type (`upcast_vae` keeps the attention in float16 if it is an AttnProcessor2_0).
    """

    own_attention = True

    def __call__(self, attn: AttentionBlock, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore
        return attn.attend(hidden_states)


# Processors that compute what a block computes by itself.
SAME_ATTENTION = (OwnAttention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)


class EqualsDiffusersClass(type):
    """The type of our classes and of those derived from them, which compare equal to diffusers' (`stands_for`).

    `from_pipe` takes a component over if `type(component) in (AutoencoderKL, ...)`, where a subclass would not do.
    Hashes stay different, so that dictionaries and sets keep the classes apart.
    """

    stands_for: type

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is getattr(cls, "stands_for", cls)

    __hash__ = type.__hash__
