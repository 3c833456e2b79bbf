"""Random numbers of a sample: a function of the seed, the sample's number and their purpose alone.

They are therefore the same on any number of ranks and after any restart. Random numbers that all images of a step
share are a function of the seed and the step's number, the same on every rank and in every micro-batch.
"""

import numpy as np
import torch
from torch import Tensor

# purposes; crops have a generator of their own, `augmentation` in train/data/samples.py
POSTERIOR_NOISE, VIEW, STEP, INPUT_NOISE, LABELS = 1, 2, 3, 4, 5
DIFFUSION = 11  # noise, time and dropped label of a diffusion model


class Draws:
    """The random numbers of a batch for one purpose.

    samples: (B,), the numbers of its samples in the run. step: the step that it is part of, counted from 0.
    """

    def __init__(self, seed: int, samples: Tensor, device: torch.device, purpose: int = VIEW, step: int = 0):
        self.seed, self.samples, self.device, self.step = seed, samples, device, step
        keys = [np.random.SeedSequence((seed, n, purpose)) for n in samples.tolist()]
        self.generators = [np.random.Generator(np.random.Philox(key)) for key in keys]

    def for_purpose(self, purpose: int) -> "Draws":
        """The random numbers of the same batch for another purpose."""
        return Draws(self.seed, self.samples, self.device, purpose, self.step)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (B, *shape), float32."""
        rows = np.empty((len(self.generators), *shape), np.float32)
        for i, generator in enumerate(self.generators):
            generator.standard_normal(out=rows[i : i + 1], dtype=np.float32)
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def centred(self, *shape: int) -> Tensor:
        """Numbers in [-1/2, 1/2), (B, *shape), float32."""
        rows = np.empty((len(self.generators), *shape), np.float32)
        for i, generator in enumerate(self.generators):
            generator.random(out=rows[i : i + 1], dtype=np.float32)
        return torch.from_numpy(rows - np.float32(0.5)).to(self.device, non_blocking=True)

    def uniform(self, low: float, high: float) -> Tensor:
        """A number in [low, high) for each image: (B,), float32."""
        numbers = [generator.uniform(low, high) for generator in self.generators]
        return torch.tensor(numbers, dtype=torch.float32).to(self.device, non_blocking=True)

    def whole(self, low: int, high: int) -> list[int]:
        """A whole number from low to high for each image, both included."""
        return [int(generator.integers(low, high + 1)) for generator in self.generators]

    def of_step(self) -> np.random.Generator:
        """Random numbers that all images of the step share; each call gives the same ones again."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, self.step, STEP))))
