"""What a module of the network is: what its class says, something more that can still be called, or unknown.

In pieces a plain layer is computed from its weights, by whatever kernel is fastest. A layer with an adapter (LoRA)
or with weights kept in another type (diffusers' layerwise casting) has to be called, but what it makes of a pixel
still depends on that pixel's neighbours alone, so that it may be called on one window after another. Of any other
hook or replacement nobody knows what it needs to see: such a network is executed whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as torch_module

from ..networks import convolutional as net

PLAIN = {
    *(net.Encoder, net.Decoder, net.DownBlock, net.MidBlock, net.UpBlock),
    *(net.ResnetBlock, net.AttentionBlock, net.Downsample, net.Upsample),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Identity, nn.ModuleList),
}
LAYERS = (nn.Conv2d, nn.Linear)
ADAPTERS = "peft.tuners.lora."  # the package whose layers wrap one of LAYERS, `base_layer`
# diffusers' names of hooks that change types only
CASTING_HOOKS = {"layerwise_casting", "peft_autocast_disable"}


def is_plain(module: nn.Module) -> bool:
    """Whether the module does what its class says."""
    return type(module) in PLAIN and not _is_hooked(module) and not _is_replaced(module)


def is_local(module: nn.Module) -> bool:
    """Whether it is a convolution or linear layer with an adapter, or with weights cast when it is called."""
    if _is_hooked(module) or (_is_replaced(module) and not _is_cast(module)):
        return False
    if is_adapter(module):
        return is_plain(module.base_layer) or is_local(module.base_layer)
    return type(module) in LAYERS and _is_cast(module)


def is_adapter(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith(ADAPTERS) and type(getattr(module, "base_layer", None)) in LAYERS
    )


def modules_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module and those inside it, with their full names, but not the insides of adapters."""
    yield name, module
    if not is_adapter(module):
        for child_name, child in module.named_children():
            yield from modules_of(child, f"{name}.{child_name}")


def has_global_hooks() -> bool:
    """Whether somebody watches the forward calls of all modules there are."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_hooked(module: nn.Module) -> bool:
    zero_padded = getattr(module, "padding_mode", "zeros") == "zeros"
    return bool(module._forward_hooks or module._forward_pre_hooks) or not zero_padded


def _is_replaced(module: nn.Module) -> bool:
    replaced = bool({"forward", "_conv_forward"} & module.__dict__.keys()) and not offloading_hook(module)
    return replaced or not getattr(module, "is_own", True)  # an attention with another processor


def _is_cast(module: nn.Module) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return bool(hooks) and hooks.keys() <= CASTING_HOOKS


def offloading_hook(module: nn.Module):
    """What accelerate's sequential offloading has put on a module; its weights are elsewhere between two uses."""
    hook = getattr(module, "_hf_hook", None)
    return hook if hasattr(hook, "weights_map") else None


@contextmanager
def weights_on_device(block: nn.Module) -> Iterator[None]:
    """Within it, the weights of the block are on the device, also if accelerate keeps them elsewhere."""
    hooks = [(m, offloading_hook(m)) for m in block.modules() if offloading_hook(m)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)
