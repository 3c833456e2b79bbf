"""The learning rate as a function of the step, and the ramp that other schedules are made of."""

import math

from ..config import Config


def ramp(step: int, warmup_steps: int) -> float:
    """0 at step 0, 1 from `warmup_steps` on, linear between."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


class LearningRate:
    """The learning rate of a step, counted from 0: scaled to the batch over all ranks, warmed up and decayed."""

    def __init__(self, config: Config, ranks: int):
        self.config, self.steps = config.optimizer, config.train.steps
        self.samples_per_step = config.data.batch_size * ranks * config.train.gradient_accumulation

    def __call__(self, step: int) -> float:
        warmup = self.config.warmup_steps
        after = max(0, step - warmup) / max(1, self.steps - warmup)
        decay = {"constant": 1.0, "linear": 1 - after, "cosine": 0.5 * (1 + math.cos(math.pi * after))}
        return self.peak() * ramp(step + 1, warmup + 1) * decay[self.config.schedule]

    def peak(self) -> float:
        """The configured rate, scaled by `optimizer.scale_rule` from the reference batch to the real one."""
        ratio = self.samples_per_step / self.config.reference_batch
        factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.config.scale_rule]
        return self.config.learning_rate * factor
