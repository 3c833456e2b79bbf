"""Gradients for a result that was computed without a graph: the backward pass executes the whole network again.

The forward pass keeps only the input, so a result that is never differentiated costs no more than under no_grad. A
backward pass begins with a forward pass of the whole network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


def recomputed_for_gradients(execute: Callable[[], Tensor], network: nn.Module, x: Tensor) -> Tensor:
    """Return execute() with the gradients of network(x), in x and the parameters; the two must be equal.

    The backward pass raises RuntimeError if x or a parameter was changed in place since.
    """
    parameters = {name: p for name, p in network.named_parameters() if not p.is_meta}
    return _Recomputed.apply(execute, network, list(parameters), x, *parameters.values())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, execute, network, names, x, *parameters):
        ctx.network, ctx.names = network, names
        kind = x.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        # makes `backward` raise if their values were changed in between
        ctx.save_for_backward(x, *parameters)
        return execute()

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        tensors, needed = (x, *parameters), ctx.needs_input_grad[3:]
        create_graph = torch.is_grad_enabled()  # True if backward was called with create_graph
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = functional_call(ctx.network, dict(zip(ctx.names, parameters, strict=True)), (x,))
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=create_graph, allow_unused=True))
        return (None, None, None, *(next(found) if need else None for need in needed))
