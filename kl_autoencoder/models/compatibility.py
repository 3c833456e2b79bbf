"""Let diffusers and its pipelines treat our classes as theirs: attention processors, comparison of classes."""

from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

from ..networks.attention import AttentionBlock


class OwnAttention(AttnProcessor2_0):
    """The `.processor` of an AttentionBlock that computes attention itself, whole or in pieces.

    It is an AttnProcessor2_0 because pipelines check this: `upcast_vae` then keeps the attention in float16.
    """

    own_attention = True

    def __call__(self, attn: AttentionBlock, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore
        return attn.attend(hidden_states)


# Processors that compute the same as `AttentionBlock.attend`.
SAME_ATTENTION = (OwnAttention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)


class EqualsDiffusersClass(type):
    """Metaclass of our autoencoders: they compare equal to the class of diffusers that they stand for.

    Pipelines' `from_pipe` takes over a component only if `type(component) in (AutoencoderKL, ...)`, which is false
    for subclasses. Hashes differ, so that dictionaries and sets keep the classes apart.
    """

    stands_for: type

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is getattr(cls, "stands_for", cls)

    __hash__ = type.__hash__
