"""Gradients of what was computed some other way: the backward pass executes the network as a whole.

A result that nobody differentiates costs no more than without gradients, and one that somebody does is right: the
forward pass keeps nothing but the input, the backward pass begins with another forward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call


def recomputed_for_gradients(execute: Callable[[], Tensor], network: nn.Module, x: Tensor) -> Tensor:
    """execute(), which must equal network(x), with network(x)'s gradients in x and in the parameters."""
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
        ctx.save_for_backward(x, *parameters)  # which notices a change of their values in between
        return execute()

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        tensors, needed = (x, *parameters), ctx.needs_input_grad[3:]
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = functional_call(ctx.network, dict(zip(ctx.names, parameters, strict=True)), (x,))
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=again, allow_unused=True))
        return (None, None, None, *(next(found) if need else None for need in needed))
