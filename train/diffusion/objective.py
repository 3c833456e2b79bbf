"""Paths from latents to noise, what the network predicts on them, and the schedulers that sample along them.

z: latents of deviation 1; e: standard normal noise; u: uniform in [0, 1), the time before scaling.

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

TIMESTEPS = 1000  # diffusers' timestep of pure noise


class Noisy(NamedTuple):
    """A point on a path, for a batch.

    latents: x_t, (B, C, h, w). timestep: (B,), as diffusers' networks take it. target: what the network has to
    predict, (B, C, h, w).
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor


class Path(Protocol):
    """A path from latents to noise. scheduler: samples along this path in pipelines.

    `path(z, noise, u)` returns the point at time u: z, noise (B, C, h, w), u (B,) in [0, 1).
    """

    scheduler: SchedulerMixin

    def __call__(self, z: Tensor, noise: Tensor, u: Tensor) -> Noisy: ...


class Flow:
    """The straight path of rectified flow; sampled in second-order steps (DPM-Solver++), with x_0 = x_t - t v."""

    def __init__(self) -> None:
        self.scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True
        )

    def __call__(self, z: Tensor, noise: Tensor, u: Tensor) -> Noisy:
        t = u.view(-1, 1, 1, 1)
        return Noisy((1 - t) * z + t * noise, TIMESTEPS * u, noise - z)


class CosineV:
    """The cosine schedule in whole timesteps, with the target v; sampled by DDIM."""

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
    """Mean squared error of each image: predicted and target (B, C, h, w) -> (B,), float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def spread_times(count: int, each: int) -> Tensor:
    """Times to validate `count` images at, `each` for every image: (count, each) in [0, 1), float32.

    The times of an image are evenly spaced. From image to image they are shifted by the golden ratio of their
    distance, so that together they cover all times.
    """
    moved = (torch.arange(count, dtype=torch.float64) * 0.6180339887498949) % 1
    return ((torch.arange(each) + moved[:, None]) / each).float()
