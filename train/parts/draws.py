"""`Draws`: random numbers that depend only on the seed, the sample's number and their purpose.

They are therefore the same on any number of ranks and after any restart. Random numbers that all images of a step
share depend only on the seed and the step's number: they are the same on every rank and in every micro-batch.
"""

import numpy as np
import torch
from torch import Tensor

# Purposes, whose numbers are independent. Crops have a generator of their own, see train/data/samples.py.
POSTERIOR_NOISE, VIEW, STEP, INPUT_NOISE, LABELS, WINDOW_PLACE, WINDOW_SCALE = 1, 2, 3, 4, 5, 6, 7
DIFFUSION = 11  # noise, time and dropped label of a diffusion model


class Draws:
    """The random numbers of a batch for one purpose. Each call draws the next ones; all tensors are on `device`.

    samples: (B,) int64, the numbers of the batch's samples in the run. step: the step that the batch is part of,
    counted from 0.
    """

    def __init__(self, seed: int, samples: Tensor, device: torch.device, purpose: int = VIEW, step: int = 0):
        self.seed, self.samples, self.device, self.step = seed, samples, device, step
        keys = [np.random.SeedSequence((seed, n, purpose)) for n in samples.tolist()]
        self.generators = [np.random.Generator(np.random.Philox(key)) for key in keys]

    def for_purpose(self, purpose: int) -> "Draws":
        """New `Draws` of the same batch for another purpose, independent of these."""
        return Draws(self.seed, self.samples, self.device, purpose, self.step)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers: (B, *shape), float32."""
        rows = np.empty((len(self.generators), *shape), np.float32)
        for i, generator in enumerate(self.generators):
            generator.standard_normal(out=rows[i : i + 1], dtype=np.float32)
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def centred(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [-1/2, 1/2): (B, *shape), float32."""
        rows = np.empty((len(self.generators), *shape), np.float32)
        for i, generator in enumerate(self.generators):
            generator.random(out=rows[i : i + 1], dtype=np.float32)
        return torch.from_numpy(rows - np.float32(0.5)).to(self.device, non_blocking=True)

    def uniform(self, low: float, high: float) -> Tensor:
        """Draw a uniform number in [low, high) for each image: (B,), float32."""
        numbers = [generator.uniform(low, high) for generator in self.generators]
        return torch.tensor(numbers, dtype=torch.float32).to(self.device, non_blocking=True)

    def whole(self, low: int, high: int) -> list[int]:
        """Draw a whole number from low to high, both included, for each image: a list of length B."""
        return [int(generator.integers(low, high + 1)) for generator in self.generators]

    def of_step(self, purpose: int = STEP) -> np.random.Generator:
        """A generator of random numbers that all images of the step share; each call starts it anew."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, self.step, purpose))))
