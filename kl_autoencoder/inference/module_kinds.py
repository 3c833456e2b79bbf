"""Recognise which modules of a network can be executed in pieces, and how.

- Plain modules (`is_plain`) compute what their class says. In pieces they are computed from their weights, by the
  fastest kernel.
- Local layers (`is_local`) are convolutions and linear layers with an adapter (LoRA), or with weights stored in
  another dtype (diffusers' layerwise casting). They have to be called, but each output pixel still depends only on
  the pixels around it, so they can be called on one window after another.
- Any other module with a hook or a replaced `forward` may need to see the whole activation: its network is executed
  whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from types import MethodType

from diffusers.models import attention_processor as processors
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.modules import module as torch_module

from ..networks import convolutional as net

# diffusers' blocks -> ours, which have the same parts under the same names (if `_has_usual_settings`)
KINDS: dict[type, type] = {
    ResnetBlock2D: net.ResnetBlock,
    processors.Attention: net.AttentionBlock,
    Downsample2D: net.Downsample,
    Upsample2D: net.Upsample,
}
PLAIN = {
    *(vae.Encoder, vae.Decoder, vae.MaskConditionDecoder),
    *(DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D, *KINDS),
    *(net.Encoder, net.Decoder, net.DownBlock, net.MidBlock, net.UpBlock),
    *(net.ResnetBlock, net.AttentionBlock, net.Downsample, net.Upsample),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Identity, nn.ModuleList, nn.SiLU, nn.Dropout),
}
# diffusers' processors that compute ordinary softmax attention
SAME_ATTENTION = (
    *(processors.AttnProcessor, processors.AttnProcessor2_0, processors.FusedAttnProcessor2_0),
    processors.XFormersAttnProcessor,
)
LAYERS = (nn.Conv2d, nn.Linear)
ADAPTERS = "peft.tuners.lora."  # package of the adapters; each wraps one of LAYERS, its `base_layer`
# diffusers' names of hooks that change dtypes only
CASTING_HOOKS = {"layerwise_casting", "peft_autocast_disable"}


def is_plain(module: nn.Module) -> bool:
    """Whether the module is of a known class, with the usual settings, without hooks and with its own `forward`."""
    known = type(module) in PLAIN and _has_usual_settings(module)
    return known and not _is_hooked(module) and not _is_replaced(module)


def is_local(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear layer with an adapter, or with layerwise casting."""
    if _is_hooked(module) or (_is_replaced(module) and not _is_cast(module)):
        return False
    if is_adapter(module):
        return is_plain(module.base_layer) or is_local(module.base_layer)
    return type(module) in LAYERS and _is_cast(module)


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is a LoRA layer of peft around a convolution or linear layer."""
    return (
        type(module).__module__.startswith(ADAPTERS) and type(getattr(module, "base_layer", None)) in LAYERS
    )


def modules_of(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the module and its descendants with their full names, outer ones first; adapters are not entered."""
    found = [(name, module)]
    for above, outer in found:
        if not is_adapter(outer):
            found += [(f"{above}.{n}", inner) for n, inner in outer._modules.items() if inner is not None]
    return found


def kind(block: nn.Module) -> type:
    """Return our class that computes the same as a plain block of ours or of diffusers."""
    return KINDS.get(type(block), type(block))


def blocks_in_order(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of an encoder or decoder (ours or diffusers') after conv_in and before conv_norm_out."""
    encodes = hasattr(network, "down_blocks")
    stages = [*network.down_blocks, network.mid_block] if encodes else [network.mid_block, *network.up_blocks]
    return [block for stage in stages for block in _blocks_of(stage) if block is not None]


def _blocks_of(stage: nn.Module) -> list[nn.Module | None]:
    if hasattr(stage, "attentions"):
        return [stage.resnets[0], *chain(*zip_longest(stage.attentions, stage.resnets[1:]))]
    resizing = stage.downsamplers if hasattr(stage, "downsamplers") else stage.upsamplers
    return [*stage.resnets, *(resizing or ())]


def has_global_hooks() -> bool:
    """Whether torch's global forward hooks, which are called for all modules, are in use."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_hooked(module: nn.Module) -> bool:
    """Whether the module has forward hooks, or pads otherwise than with zeros."""
    zero_padded = getattr(module, "padding_mode", "zeros") == "zeros"
    return bool(module._forward_hooks or module._forward_pre_hooks) or not zero_padded


def _is_replaced(module: nn.Module) -> bool:
    """Whether `forward` or the attention of the module is not its own; offloading by accelerate does not count."""
    forward = module.__dict__.get("forward")
    # The module's own `forward` as an attribute is what removed hooks leave behind.
    own = isinstance(forward, MethodType) and (forward.__func__, forward.__self__) == (
        type(module).forward,
        module,
    )
    replaced = (forward is not None and not own) or "_conv_forward" in module.__dict__
    return (replaced and not offloading_hook(module)) or not getattr(module, "is_own", True)


def _has_usual_settings(module: nn.Module) -> bool:
    """Whether a module has the settings of Encoder and Decoder; with others it computes something else."""
    if isinstance(module, nn.Dropout):
        return module.p == 0 or not module.training
    if isinstance(module, ResnetBlock2D):
        unused = (module.time_emb_proj, module.upsample, module.downsample)
        return unused == (None, None, None) and module.output_scale_factor == 1 and _is_silu(module)
    if isinstance(module, processors.Attention):
        unused = (module.spatial_norm, module.norm_q, module.norm_k)
        usual = module.heads == module.residual_connection == module.rescale_output_factor == 1
        known = module.group_norm is not None and type(module.processor) in SAME_ATTENTION
        return unused == (None, None, None) and usual and known
    if isinstance(module, (Upsample2D, Downsample2D)):
        usual = module.use_conv and module.norm is None and module.conv.kernel_size == (3, 3)
        return usual and (module.padding == 0 if isinstance(module, Downsample2D) else module.interpolate)
    return True


def _is_silu(block: ResnetBlock2D) -> bool:
    return isinstance(block.nonlinearity, nn.SiLU)


def _is_cast(module: nn.Module) -> bool:
    """Whether the module has hooks of diffusers, and only such that change dtypes."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return bool(hooks) and hooks.keys() <= CASTING_HOOKS


def offloading_hook(module: nn.Module):
    """Return the hook of accelerate's sequential offloading, which loads the weights for each use; else None."""
    hook = getattr(module, "_hf_hook", None)
    return hook if hasattr(hook, "weights_map") else None


@contextmanager
def weights_on_device(block: nn.Module) -> Iterator[None]:
    """Keep the weights of a block on the device within the `with` statement, if accelerate has offloaded them."""
    hooks = [(m, offloading_hook(m)) for m in block.modules() if offloading_hook(m)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
