"""How a network is executed: in pieces or whole, what its gradients are, and what to do when memory runs out."""

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
    has_global_hooks,
    in_order,
    is_adapter,
    is_local,
    is_plain,
    kind,
    modules_of,
    offloading_hook,
)
from .workers import Workers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRIP_BYTES_A_THREAD = 2 << 20  # on a CPU: about what its share of the caches holds
STRIP_BYTES_GPU, STRIP_BYTES_GPU_LEAST = 256 << 20, 64 << 20
STREAMS = 3  # when offloading: one copies in, one computes, one copies out
# On a CPU, where the largest activation is no more than two strips, many small steps cost more than they save,
# above all where another process holds a core and each step waits for it. The package's model and Stable
# Diffusion's on two threads: in pieces 0.6 to 0.9 times as fast as whole at 2 to 8 MiB, 1.0 to 1.1 at 16, 1.6
# at 32.
SMALL_BYTES_A_THREAD = 4 << 20
LARGEST_ACTIVATIONS = 2.5  # held at once, scratch memory included


def infer(
    network: net.Encoder | net.Decoder, x: Tensor, tiling: bool = False, offload: bool = False
) -> Tensor:
    """network(x), the same to rounding: in pieces, or whole if it is small or if `why_whole` gives a reason.

    In evaluation mode a call that may need gradients is executed in pieces too. It keeps x alone, and a backward
    pass, if there is one, begins with executing the network once more, whole. In training mode gradients need
    all activations: the network is executed whole. Autocast, adapters (LoRA) and layerwise casting are reasons
    too, except where it is tiled or where memory runs out.

    Args:
        tiling: the least memory: one image at a time, on a GPU also in smaller strips. Chosen by itself where a
            batch would not fit, and where memory runs out all the same, with a warning. What cannot be tiled is
            executed whole, with a warning that says why.
        offload: keep the large activations in host memory.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return network(x)
    least = tiling or offload
    cause = why_whole(network, x)
    if cause is not None:
        if least:
            warnings.warn(
                f"{type(network).__name__}: not tiled, memory grows as without: {cause}", stacklevel=2
            )
        return network(x)
    return infer_exactly(network, x, least, offload)


def infer_exactly(network: nn.Module, x: Tensor, least: bool, offload: bool) -> Tensor:
    """`infer` for a network that nothing needs whole, with the retry when memory runs out."""
    if not least and is_small(network, x) and not is_differentiated(network, x):
        return network(x)  # before anything that takes as long as a small network
    try:
        if not least and is_faster_whole(network, x):
            return network(x)
        return without_graph(network, x, least or not fits(network, x), offload)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if least or not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # outside of the except clause, where the traceback no longer keeps the first attempt's tensors
    what = f"{type(network).__name__} of {tuple(x.shape)}: {reason.rstrip('.')}."
    remedy = "Retrying, exactly, in the least memory; enable_tiling() does so from the start."
    warnings.warn(f"{what} {remedy}", stacklevel=2)
    return without_graph(network, x, least=True)


def without_graph(network: nn.Module, x: Tensor, least: bool, offload: bool = False) -> Tensor:
    """network(x) in pieces, or whole where it is small; a backward pass, if there is one, computes it again."""
    if not least and is_small(network, x):
        execute = partial(infer_whole, network, x)
    else:
        execute = partial(infer_in_pieces, network, x, least, offload)
    return recomputed_for_gradients(execute, network, x) if is_differentiated(network, x) else execute()


@torch.no_grad()
def infer_whole(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


@torch.no_grad()
def infer_in_pieces(
    network: nn.Module, x: Tensor, least: bool = False, offload: bool = False, rows: int | None = None
) -> Tensor:
    """network(x) in strips of about a fixed number of bytes, or of `rows` rows, a multiple of 4."""
    device = execution_device(network, x)
    if device.type == "cpu":
        strip_bytes = STRIP_BYTES_A_THREAD * (2 if least else max(2, torch.get_num_threads()))
    else:
        strip_bytes = STRIP_BYTES_GPU_LEAST if least else STRIP_BYTES_GPU
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    # Autocast, and the types of weights that are cast for a moment, are one thread's own.
    streams = STREAMS if offload and not autocast and are_plain(network) else 1
    x = x.to(device)
    images = x.split(1) if least else [x]
    with Workers(streams, device) as workers:
        results = [
            Executor(one, workers, strip_bytes, rows, offload, dtype, autocast).run(network, one)
            for one in images
        ]
    return results[0] if len(results) == 1 else torch.cat(results)


# ---------------------------------------------------------------- pieces or the whole


def why_whole(network: nn.Module, x: Tensor) -> str | None:
    """The reason why executing the network in pieces would differ from calling it, or None if it would not."""
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


META = torch.device("meta")  # where the weights of a module are that accelerate keeps elsewhere


def is_faster_whole(network: nn.Module, x: Tensor) -> bool:
    """Whether the network is compiled, or has layers that would have to be called on every strip."""
    compiled = network._compiled_call_impl is not None
    return compiled or torch.is_autocast_enabled(x.device.type) or not are_plain(network)


def is_small(network: nn.Module, x: Tensor) -> bool:
    on_cpu = execution_device(network, x).type == "cpu"
    limit = SMALL_BYTES_A_THREAD * torch.get_num_threads()
    return on_cpu and largest_activation(network, x) * x.element_size() <= limit


def are_plain(network: nn.Module) -> bool:
    return not any(is_adapter(m) or is_local(m) for _, m in modules_of(network, ""))


def is_differentiated(network: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in network.parameters()))


def execution_device(network: nn.Module, x: Tensor) -> torch.device:
    hook = offloading_hook(network.conv_in)
    return torch.device(hook.execution_device) if hook else x.device


# ---------------------------------------------------------------- memory


def fits(network: nn.Module, x: Tensor) -> bool:
    """Whether the batch as a whole fits into the memory that is free."""
    needed = LARGEST_ACTIVATIONS * largest_activation(network, x) * x.element_size()
    if x.device.type == "cpu":
        return needed <= available_host_memory()
    free, _ = torch.cuda.mem_get_info(x.device)
    reserved = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return needed <= free + reserved


def largest_activation(network: nn.Module, x: Tensor) -> int:
    """Elements of the largest tensor between two blocks."""
    b, _, height, width = x.shape
    channels = out_channels(network.conv_in)
    sizes = [b * channels * height * width]
    for block in in_order(network):
        if kind(block) is net.Upsample:
            height, width = 2 * height, 2 * width
        elif kind(block) is net.Downsample:
            height, width = height // 2, width // 2
        elif kind(block) is net.ResnetBlock:
            channels = out_channels(block.conv1)
        sizes.append(b * channels * height * width)
    return max(sizes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out; on a CPU torch raises a plain RuntimeError."""
    said = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in said)
