"""What the configuration says of a step, as functions of its number."""

import math
from dataclasses import dataclass

from ..config import Config


def ramp(step: int, warmup_steps: int) -> float:
    """0 at step 0, 1 from `warmup_steps` on, linear between."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


@dataclass(frozen=True)
class Schedules:
    """Steps count from 0. `samples_per_step`: over all ranks and micro-batches."""

    config: Config
    samples_per_step: int

    def discriminates(self, step: int) -> bool:
        """Whether the discriminator trains."""
        config = self.config.loss.adversarial
        return config.weight > 0 and step >= config.disc_start

    def adversarial_weight(self, step: int) -> float:
        """0 until the discriminator has had its stretch alone, then rising to the configured weight."""
        config = self.config.loss.adversarial
        since = step - config.disc_start - config.disc_warmup_steps
        return config.weight * ramp(since + 1, config.ramp_steps + 1) if since >= 0 else 0.0

    def kl_weight(self, step: int) -> float:
        config = self.config.loss.kl
        return config.weight * ramp(step, config.warmup_steps)

    def peak_learning_rate(self) -> float:
        """The configured rate, scaled from the reference batch to the real one by the rule."""
        config = self.config.optimizer
        ratio = self.samples_per_step / config.reference_batch
        return (
            config.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.scale_rule]
        )

    def learning_rate(self, step: int) -> float:
        """Warmed up and decayed."""
        config, steps = self.config.optimizer, self.config.train.steps
        after = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - after, "cosine": 0.5 * (1 + math.cos(math.pi * after))}
        warm = ramp(step + 1, config.warmup_steps + 1)
        return self.peak_learning_rate() * warm * decay[config.schedule]

    def discriminator_learning_rate(self, step: int) -> float:
        """The autoencoder's, in the proportion of the two configured rates."""
        own, rate = self.config.loss.adversarial.learning_rate, self.learning_rate(step)
        return rate * own / self.config.optimizer.learning_rate if own else rate
