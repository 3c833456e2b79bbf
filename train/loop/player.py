"""A network with all that moves it: optimizer, learning rate, clipping, skipped steps, moving average, state."""

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
    """Exponential moving average of a network's weights, in float32: `network` is the averaged one."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """`step` counts from 1; the decay rises with it, so that the first weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)


class Player:
    """One of the networks that a task trains.

    module: the network; `network` is the same as DDP wraps it, to be called in a step. learning_rate: of a step.
    name: "" for the task's first, whose files in a checkpoint are `model` and `optimizer`; those of another are
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
        """Set the learning rate of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)

    def backward(self, loss: Tensor, watched: Tensor) -> None:
        """Backward; where `watched` is not finite all gradients become NaN, and so, averaged, on every rank."""
        self.accelerator.backward(loss * torch.where(watched.detach().isfinite(), 1.0, math.nan))

    def update(self) -> dict[str, Tensor]:
        """Clip and step, but only where the gradient's norm over all ranks is finite; the host waits for nothing.

        Returns the norm by its name; nothing before the last micro-batch of a step.
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
                self.optimizer.found_inf = (~norm.isfinite()).float()  # as a GradScaler does
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
