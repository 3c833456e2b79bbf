"""`Player`, a network with its optimizer, clipping, skipped steps and saved state; and a moving average."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .checkpoints.files import load_optimizer, optimizer_tensors
from .context import RunContext

Tensors = dict[str, dict[str, Tensor]]  # by the name of their file in a checkpoint


class MovingAverage:
    """Exponential moving average of a network's weights, in float32: `network` is the averaged one.

    Buffers, which hold averages of their own, are copied.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """`step` counts from 1; the decay rises with it, so that the first weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for own, other in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(other)


class Player:
    """One of the networks that a task trains.

    module: the network; `network` is the same, wrapped by DDP, to be called in a step. learning_rate: step -> rate.
    name: "" for a task's first player, saved in checkpoints as `model` and `optimizer`; the files of any other are
    `NAME` and `NAME_optimizer`, and its gradient's norm is logged as `NAME/gradient_norm`.
    """

    def __init__(
        self, module: nn.Module, run: RunContext, learning_rate: Callable[[int], float], name: str = ""
    ):
        config = run.config.optimizer
        self.module, self.accelerator, self.learning_rate = module, run.accelerator, learning_rate
        self.file, self.optimizer_file = name or "model", f"{name}_optimizer" if name else "optimizer"
        self.gradient_norm = f"{name}/gradient_norm" if name else "gradient_norm"
        self.clip = config.gradient_clip or math.inf
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.network = self.accelerator.prepare(module)
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, before its first micro-batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)

    def backward(self, loss: Tensor, watched: Tensor) -> None:
        """Compute gradients; if `watched` is not finite, all become NaN, and on every rank, as DDP averages them.

        `update` then skips the step.
        """
        self.accelerator.backward(loss * torch.where(watched.detach().isfinite(), 1.0, math.nan))

    def update(self) -> dict[str, Tensor]:
        """Clip the gradients and step; the step is skipped if the gradients' norm is not finite.

        The device decides that (`found_inf`), so the host does not wait for it. Returns the norm by its name, and
        {} before the last micro-batch of a step.
        """
        if not self.accelerator.sync_gradients:
            return {}
        scaler = self.accelerator.scaler
        with record_function("optimizer"):
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            if scaler is not None:
                scaler.step(self.optimizer)
            else:
                self.optimizer.found_inf = (~norm.isfinite()).float()  # AdamW reads it as from a GradScaler
                self.optimizer.step()
            self.optimizer.zero_grad()
        return {self.gradient_norm: norm}

    def tensors(self) -> Tensors:
        """Everything that its next step depends on."""
        return {
            self.file: self.module.state_dict(),
            self.optimizer_file: optimizer_tensors(self.optimizer),
        }

    def load(self, tensors: Tensors) -> None:
        """The inverse of `tensors`."""
        self.module.load_state_dict(tensors[self.file])
        load_optimizer(self.optimizer, tensors[self.optimizer_file])
