"""The learning rate as a function of the step, and the linear ramp that other schedules use, too."""

import math

from ..config import Config


def ramp(step: int, warmup_steps: int) -> float:
    """A factor that rises linearly from 0 at step 0 to 1 at `warmup_steps`, and stays there."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


class LearningRate:
    """The learning rate of a step: scaled to the batch over all ranks, warmed up linearly, then decayed.

    Call it with the step, counted from 0. The decay is `optimizer.schedule`: none, or linear or by a half cosine to
    0 at `train.steps`. samples_per_step: the batch over all ranks and micro-batches.
    """

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
