"""`Player`, a network with its optimizer; `MovingAverage` of a network's weights."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from .checkpoints.files import load_optimizer, optimizer_tensors
from .context import RunContext

Tensors = dict[str, dict[str, Tensor]]  # file name in a checkpoint, without suffix -> {tensor name: tensor}


class MovingAverage:
    """Exponential moving average (EMA) of a network's weights, in their dtype; `network` is the averaged network.

    Buffers, which may hold averages of their own, are copied.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average: average = decay * average + (1 - decay) * weights, once after each step.

        step: the number of steps taken, from 1. The decay is min(`decay`, (1 + step) / (10 + step)), as in
        TensorFlow's ExponentialMovingAverage, so that the first weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for own, other in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(other)


class Player:
    """One of the networks that a task trains, with its AdamW optimizer.

    module: the network. Steps must call `network`, which is the same, wrapped by DDP if there are several ranks.
    learning_rate: step, from 0 -> rate. name: "" for a task's main player, whose checkpoint files are `model` and
    `optimizer`; those of any other are `NAME` and `NAME_optimizer`, and its gradient norm is logged as
    `NAME/gradient_norm`.
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
        """Set the learning rate of `step`, before its first micro-batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)

    def backward(self, loss: Tensor, watched: Tensor) -> None:
        """Accumulate the gradients of `loss`; if `watched` is not finite, make all of them NaN. Both are scalars.

        DDP's average is then NaN on every rank, and `update` skips the step on all of them.
        """
        self.accelerator.backward(loss * torch.where(watched.detach().isfinite(), 1.0, math.nan))

    def update(self) -> dict[str, Tensor]:
        """Clip the gradients and step the optimizer, which skips the step if the gradients' norm is not finite.

        The skip is decided on the device (`found_inf`), so the host does not wait for it. Returns
        {name: norm before clipping}. Before the last micro-batch of a step it does nothing and returns {}.
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
                self.optimizer.found_inf = (~norm.isfinite()).float()  # fused AdamW skips the step if it is 1
                self.optimizer.step()
            self.optimizer.zero_grad()
        return {self.gradient_norm: norm}

    def tensors(self) -> Tensors:
        """Weights and optimizer state: everything of this player that the next step depends on."""
        return {
            self.file: self.module.state_dict(),
            self.optimizer_file: optimizer_tensors(self.optimizer),
        }

    def load(self, tensors: Tensors) -> None:
        """Load what `tensors` returned. Raises KeyError or RuntimeError for the tensors of another network."""
        self.module.load_state_dict(tensors[self.file])
        load_optimizer(self.optimizer, tensors[self.optimizer_file])
