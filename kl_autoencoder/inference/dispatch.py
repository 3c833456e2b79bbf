"""Decide how a network is executed: in pieces or whole, with which gradients, and again when memory runs out."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..networks import convolutional as net
from ..networks.recomputed import recomputed_for_gradients
from .executor import Executor
from .layers import out_channels
from .memory import available_host_memory
from .module_kinds import (
    blocks_in_order,
    has_global_hooks,
    is_adapter,
    is_local,
    is_plain,
    kind,
    modules_of,
    offloading_hook,
)
from .workers import Workers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRIP_BYTES_A_THREAD = 2 << 20  # on a CPU: about a thread's share of the caches
STRIP_BYTES_GPU, STRIP_BYTES_GPU_LEAST = 256 << 20, 64 << 20
STREAMS = 3  # when offloading: while one computes, others copy from and to host memory
# On a CPU a network whose largest activation is at most this large (two strips) is executed whole: many small steps
# cost more than they save, above all if another process uses one of the cores. Measured on two threads with the
# package's model and Stable Diffusion's, speed in pieces over speed whole, by the size of the largest activation:
# 0.6 to 0.9 at 2 to 8 MiB, 1.0 to 1.1 at 16 MiB, 1.6 at 32 MiB.
SMALL_BYTES_A_THREAD = 4 << 20
ACTIVATIONS_HELD = 2.5  # memory that execution takes, scratch included, in units of the largest activation


def infer(
    network: net.Encoder | net.Decoder, x: Tensor, tiling: bool = False, offload: bool = False
) -> Tensor:
    """Return network(x), equal up to rounding, executed in pieces or whole.

    x: images (B, C, H, W) of an encoder, latents (B, C, h, w) of a decoder; the result is as in the network.

    The network is executed whole if `why_whole` gives a reason. Unless it is tiled, it is also executed whole if
    its activations are small (on a CPU), if it is compiled, under autocast, and with adapters (LoRA) or layerwise
    casting.

    Gradients: in training mode a call that needs gradients is executed whole, since it needs all activations. In
    evaluation mode it is executed in pieces and keeps only x; a backward pass first executes the whole network
    again.

    Args:
        tiling: take the least memory: one image at a time, on a GPU also in smaller strips. This is chosen without
            asking for it if the batch does not fit into memory, and, with a warning, if memory runs out. A network
            that cannot be tiled is executed whole, with a warning that says why.
        offload: keep the large activations in host memory; implies `tiling`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return network(x)
    least_memory = tiling or offload
    cause = why_whole(network, x)
    if cause is not None:
        if least_memory:
            warnings.warn(
                f"{type(network).__name__}: not tiled, memory grows as without: {cause}", stacklevel=2
            )
        return network(x)
    return infer_exactly(network, x, least_memory, offload)


def infer_exactly(network: nn.Module, x: Tensor, least_memory: bool, offload: bool) -> Tensor:
    """`infer` where `why_whole` gives no reason; retries in the least memory if memory runs out."""
    if not least_memory and is_small(network, x) and not is_differentiated(network, x):
        return network(x)  # first, as the checks below take as long as a small network
    try:
        if not least_memory and is_faster_whole(network, x):
            return network(x)
        return infer_without_graph(network, x, least_memory or not fits(network, x), offload)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if least_memory or not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # Outside of the except clause, whose traceback would keep the tensors of the first attempt alive.
    what = f"{type(network).__name__} of {tuple(x.shape)}: {reason.rstrip('.')}."
    remedy = "Retrying, exactly, in the least memory; enable_tiling() does so from the start."
    warnings.warn(f"{what} {remedy}", stacklevel=2)
    return infer_without_graph(network, x, least_memory=True)


def infer_without_graph(network: nn.Module, x: Tensor, least_memory: bool, offload: bool = False) -> Tensor:
    """Return network(x), in pieces or, if it is small, whole; a backward pass recomputes the activations."""
    if not least_memory and is_small(network, x):
        execute = partial(infer_whole, network, x)
    else:
        execute = partial(infer_in_pieces, network, x, least_memory, offload)
    return recomputed_for_gradients(execute, network, x) if is_differentiated(network, x) else execute()


@torch.no_grad()
def infer_whole(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


@torch.no_grad()
def infer_in_pieces(
    network: nn.Module, x: Tensor, least_memory: bool = False, offload: bool = False, rows: int | None = None
) -> Tensor:
    """Return network(x), computed without gradients in strips of a fixed size.

    least_memory: one image at a time, and smaller strips. offload: keep activations in host memory. rows: height of
    a strip in rows, a multiple of 4; by default it follows from the bytes of a strip.
    """
    device = execution_device(network, x)
    if device.type == "cpu":
        strip_bytes = STRIP_BYTES_A_THREAD * (2 if least_memory else max(2, torch.get_num_threads()))
    else:
        strip_bytes = STRIP_BYTES_GPU_LEAST if least_memory else STRIP_BYTES_GPU
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    # One thread under autocast, which is a setting of the calling thread, and with layerwise casting, where
    # threads would change the dtype of weights under one another.
    streams = STREAMS if offload and not autocast and has_only_plain_layers(network) else 1
    x = x.to(device)
    images = x.split(1) if least_memory else [x]
    with Workers(streams, device) as workers:
        results = [
            Executor(one, workers, strip_bytes, rows, offload, dtype, autocast).run(network, one)
            for one in images
        ]
    return results[0] if len(results) == 1 else torch.cat(results)


# ---------------------------------------------------------------- pieces or the whole


def why_whole(network: nn.Module, x: Tensor) -> str | None:
    """Return why execution in pieces could differ from network(x), as a phrase for messages; None if it cannot."""
    device = execution_device(network, x)
    if device.type not in ("cpu", "cuda"):
        return f"the device is {device}"
    autocast = torch.is_autocast_enabled(x.device.type)
    allowed = DTYPES if not autocast else (torch.float32, torch.bfloat16, torch.float16)
    modules = list(modules_of(network, type(network).__name__.lower()))
    changed = [name for name, module in modules if not is_plain(module) and not is_local(module)]
    tensors = [p for _, module in modules if is_plain(module) for p in module._parameters.values()]
    tensors = [x, *(p for p in tensors if p is not None)]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transformation of torch.func (vmap, jvp ...) is active"
    if network.training and is_differentiated(network, x):
        return "in training mode gradients need all activations; eval() or torch.no_grad() would tile it"
    if has_global_hooks():
        return "there are global forward hooks"
    if changed:
        return f"{changed[0]} has hooks, another attention processor, or was replaced"
    if not all(p.device in (device, META) for p in tensors[1:]):
        return f"not all weights are on the device {device}"
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype not in allowed for t in tensors):
        return "the type of the input or of a weight"
    if not autocast and any(t.dtype != x.dtype for t in tensors):
        return "input and weights differ in type"
    return None


META = torch.device("meta")  # device of the weights that accelerate has offloaded


def is_faster_whole(network: nn.Module, x: Tensor) -> bool:
    """Whether the network is compiled, or has layers that would have to be called (`Layers`) for every strip."""
    compiled = network._compiled_call_impl is not None
    return compiled or torch.is_autocast_enabled(x.device.type) or not has_only_plain_layers(network)


def is_small(network: nn.Module, x: Tensor) -> bool:
    """Whether the network runs on a CPU with activations too small to gain from execution in pieces."""
    on_cpu = execution_device(network, x).type == "cpu"
    limit = SMALL_BYTES_A_THREAD * torch.get_num_threads()
    return on_cpu and largest_activation(network, x) * x.element_size() <= limit


def has_only_plain_layers(network: nn.Module) -> bool:
    """Whether no module of the network has an adapter or layerwise casting."""
    return not any(is_adapter(m) or is_local(m) for _, m in modules_of(network, ""))


def is_differentiated(network: nn.Module, x: Tensor) -> bool:
    """Whether autograd would record network(x)."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in network.parameters()))


def execution_device(network: nn.Module, x: Tensor) -> torch.device:
    """Return the device that the network computes on: that of x, or the one accelerate moves its weights to."""
    hook = offloading_hook(network.conv_in)
    return torch.device(hook.execution_device) if hook else x.device


# ---------------------------------------------------------------- memory


def fits(network: nn.Module, x: Tensor) -> bool:
    """Whether there is enough free memory to execute the whole batch at once."""
    needed = ACTIVATIONS_HELD * largest_activation(network, x) * x.element_size()
    if x.device.type == "cpu":
        return needed <= available_host_memory()
    free, _ = torch.cuda.mem_get_info(x.device)
    reserved = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return needed <= free + reserved


def largest_activation(network: nn.Module, x: Tensor) -> int:
    """Return the number of elements of the largest activation between two blocks of the network."""
    b, _, height, width = x.shape
    channels = out_channels(network.conv_in)
    sizes = [b * channels * height * width]
    for block in blocks_in_order(network):
        if kind(block) is net.Upsample:
            height, width = 2 * height, 2 * width
        elif kind(block) is net.Downsample:
            height, width = height // 2, width // 2
        elif kind(block) is net.ResnetBlock:
            channels = out_channels(block.conv1)
        sizes.append(b * channels * height * width)
    return max(sizes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU torch raises a plain RuntimeError, which only its message tells."""
    said = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in said)
