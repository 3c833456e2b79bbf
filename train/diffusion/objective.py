"""Paths from latents to noise, and what the network predicts on them, as pure functions; their schedulers.

z: latents of deviation one; e: standard normal noise; u: uniform in [0, 1).

| | x_t | target | time t |
|---|---|---|---|
| flow | (1 - t) z + t e | e - z | u |
| v | a_t z + s_t e | a_t e - s_t z | whole, of 1000; a_t^2 + s_t^2 = 1, a cosine (Nichol & Dhariwal 2021) |

flow: Liu et al. 2022, Lipman et al. 2022. v: Salimans & Ho 2022.
"""

from typing import NamedTuple, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

TIMESTEPS = 1000  # what diffusers' schedulers call the time of pure noise


class Noisy(NamedTuple):
    """latents: x_t, (B, C, h, w). timestep: (B,), as the network is told it. target: what it has to predict."""

    latents: Tensor
    timestep: Tensor
    target: Tensor


class Path(Protocol):
    """scheduler: for pipelines, which takes the network's prediction along the same path."""

    scheduler: SchedulerMixin

    def __call__(self, z: Tensor, noise: Tensor, u: Tensor) -> Noisy: ...


class Flow:
    """The straight path. Steps are of second order (DPM-Solver++), whose x_0 is x_t - t v here."""

    def __init__(self) -> None:
        self.scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True
        )

    def __call__(self, z: Tensor, noise: Tensor, u: Tensor) -> Noisy:
        t = u.view(-1, 1, 1, 1)
        return Noisy((1 - t) * z + t * noise, TIMESTEPS * u, noise - z)


class CosineV:
    """The cosine schedule in whole timesteps, with the target v."""

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler(
            num_train_timesteps=TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
        )

    def __call__(self, z: Tensor, noise: Tensor, u: Tensor) -> Noisy:
        t = (TIMESTEPS * u).long().clamp(max=TIMESTEPS - 1)
        square = self.scheduler.alphas_cumprod.to(z.device)[t].view(-1, 1, 1, 1)
        a, s = square.sqrt(), (1 - square).sqrt()
        return Noisy(a * z + s * noise, t, a * noise - s * z)


PATHS: dict[str, type[Path]] = {"flow": Flow, "v": CosineV}


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """(B, C, h, w) twice -> (B,), the mean over an image, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def spread_times(count: int, each: int) -> Tensor:
    """Times for the validation of `count` images, `each` a time: (count, each) in [0, 1), evenly spread.

    Between images they are moved by the golden ratio, so that all times are covered.
    """
    moved = (torch.arange(count, dtype=torch.float64) * 0.6180339887498949) % 1
    return ((torch.arange(each) + moved[:, None]) / each).float()
