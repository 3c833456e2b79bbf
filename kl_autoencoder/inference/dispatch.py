"""How a network is executed: whole, as training needs it, or in pieces; and what to do when memory runs out."""

import warnings

import psutil
import torch
from torch import Tensor, nn

from ..networks import convolutional as net
from .executor import Executor, in_order, offloading_hook
from .workers import Workers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN_MODULES = {
    *(net.Encoder, net.Decoder, net.DownBlock, net.MidBlock, net.UpBlock),
    *(net.ResnetBlock, net.AttentionBlock, net.Downsample, net.Upsample),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Identity, nn.ModuleList),
}
STRIP_BYTES_A_THREAD = 2 << 20  # on a CPU: about what its share of the caches holds
STRIP_BYTES_GPU, STRIP_BYTES_GPU_LEAST = 256 << 20, 64 << 20
STREAMS = 3  # when offloading: one copies in, one computes, one copies out
LARGEST_ACTIVATIONS = 2.5  # held at once, scratch memory included


def infer(
    network: net.Encoder | net.Decoder, x: Tensor, tiling: bool = False, offload: bool = False
) -> Tensor:
    """network(x), in pieces where nothing but the result is asked for; the same to rounding.

    Where there are gradients, torch.compile, autocast, hooks, or modules that somebody has replaced or changed,
    it is network(x) itself.

    Args:
        tiling: the least memory: one image at a time, on a GPU also in smaller strips. Chosen by itself where a
            batch would not fit, and where memory runs out all the same, with a warning.
        offload: keep the large activations in host memory.
    """
    if not can_infer(network, x):
        return network(x)
    least = tiling or offload
    try:
        if network._compiled_call_impl is not None and not least:
            return network(x)
        return infer_in_pieces(network, x, least or not fits(network, x), offload)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if least or not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # outside of the except clause, where the traceback no longer keeps the first attempt's tensors
    what = f"{type(network).__name__} of {tuple(x.shape)}: {reason.rstrip('.')}."
    remedy = "Retrying, exactly, in the least memory; enable_tiling() does so from the start."
    warnings.warn(f"{what} {remedy}", stacklevel=2)
    return infer_in_pieces(network, x, least=True)


@torch.no_grad()
def infer_in_pieces(
    network: nn.Module, x: Tensor, least: bool = False, offload: bool = False, rows: int | None = None
) -> Tensor:
    """`rows` fixes the height of all strips, a multiple of 4, instead of their size in bytes."""
    device = execution_device(network, x)
    if device.type == "cpu":
        strip_bytes = STRIP_BYTES_A_THREAD * (2 if least else max(2, torch.get_num_threads()))
    else:
        strip_bytes = STRIP_BYTES_GPU_LEAST if least else STRIP_BYTES_GPU
    x = x.to(device)
    images = x.split(1) if least else [x]
    with Workers(STREAMS if offload else 1, device) as workers:
        results = [Executor(one, workers, strip_bytes, rows, offload).run(network, one) for one in images]
    return results[0] if len(results) == 1 else torch.cat(results)


def can_infer(network: nn.Module, x: Tensor) -> bool:
    """Whether executing the network in pieces, from its parameters, does what calling it would do."""
    parameters = list(network.parameters())
    differentiated = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters))
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    device = execution_device(network, x)
    return (
        not (differentiated or traced or torch.is_autocast_enabled(x.device.type))
        and device.type in ("cpu", "cuda")
        and x.dtype in DTYPES
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype for t in (x, *parameters))
        and all(p.device in (device, torch.device("meta")) for p in parameters)
        and all(is_plain(module) for module in network.modules())
    )


def is_plain(module: nn.Module) -> bool:
    """Whether the module does what its class says."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    replaced = {"forward", "_conv_forward"} & module.__dict__.keys() and not offloading_hook(module)
    zero_padded = getattr(module, "padding_mode", "zeros") == "zeros"
    return type(module) in PLAIN_MODULES and zero_padded and not hooked and not replaced


def execution_device(network: nn.Module, x: Tensor) -> torch.device:
    hook = offloading_hook(network.conv_in)
    return torch.device(hook.execution_device) if hook else x.device


def fits(network: nn.Module, x: Tensor) -> bool:
    """Whether the batch as a whole fits into the memory that is free."""
    needed = LARGEST_ACTIVATIONS * largest_activation(network, x) * x.element_size()
    if x.device.type == "cpu":
        return needed <= psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(x.device)
    reserved = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return needed <= free + reserved


def largest_activation(network: nn.Module, x: Tensor) -> int:
    """Elements of the largest tensor between two blocks."""
    b, _, height, width = x.shape
    channels = network.conv_in.out_channels
    sizes = [b * channels * height * width]
    for block in in_order(network):
        if isinstance(block, net.Upsample):
            height, width = 2 * height, 2 * width
        elif isinstance(block, net.Downsample):
            height, width = height // 2, width // 2
        elif isinstance(block, net.ResnetBlock):
            channels = block.conv1.out_channels
        sizes.append(b * channels * height * width)
    return max(sizes)


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU torch raises a plain RuntimeError."""
    said = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in said)
