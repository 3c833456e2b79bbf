"""The first lines that a run prints: what trains, on how many samples a step, and at which learning rate."""

from ..config import Config
from .schedules import LearningRate


def first_lines(
    config: Config, rate: LearningRate, parameters: int, ranks: int, device: str, counted: dict[str, int]
) -> str:
    """Describe a run by its effective values: the batch over all ranks, and the learning rate for that batch.

    parameters: how many are trained. device: its type, "cuda" say. counted: the task's keys that count steps, and
    their values (`Task.counted_in_steps`).
    """
    train, batch = config.train, rate.samples_per_step
    ranks_word = "rank" if ranks == 1 else "ranks"
    lines = [
        f"{config.output_dir}: {parameters:,} trainable parameters on {ranks} x {device}, "
        f"{train.mixed_precision} mixed precision",
        f"batch {batch} = {config.data.batch_size} x {ranks} {ranks_word} x {train.gradient_accumulation} "
        f"accumulated; {train.steps:,} steps = {train.steps * batch:,} samples",
        _rate(config, rate),
    ]
    if config.optimizer.scale_rule != "none" and batch != config.optimizer.reference_batch:
        same = ", ".join(
            f"{key}={value:.5g}" for key, value in for_the_same_samples(config, batch, counted).items()
        )
        lines.append(
            f"{batch / config.optimizer.reference_batch:.3g} times the reference batch; only the learning rate "
            f"is scaled, and for the same samples other keys would be {same}"
        )
    return "\n".join(lines)


def for_the_same_samples(config: Config, batch: int, counted: dict[str, int]) -> dict[str, float]:
    """Convert the keys that count steps, and ema.decay, to a batch of k times `optimizer.reference_batch`.

    A number of steps becomes steps / k, after which the run has consumed as many samples. ema.decay becomes
    decay^k, which averages over as many samples (Busbridge et al. 2023, "How to Scale Your EMA", eq. 4). `counted`
    as in `first_lines`; returns dotted key -> converted value.
    """
    k = batch / config.optimizer.reference_batch
    keys: dict[str, float] = {"train.steps": max(1, round(config.train.steps / k))}
    keys |= {key: round(steps / k) for key, steps in counted.items()}
    if config.ema.enabled:
        keys["ema.decay"] = config.ema.decay**k
    return keys


def _rate(config: Config, rate: LearningRate) -> str:
    optimizer = config.optimizer
    text = f"learning rate {rate.peak():.3g}"
    if optimizer.scale_rule == "none":
        text += " for this batch (optimizer.scale_rule: none)"
    else:
        ratio = f"{rate.samples_per_step} / {optimizer.reference_batch}"
        factor = f"sqrt({ratio})" if optimizer.scale_rule == "sqrt" else f"({ratio})"
        text += f" = {optimizer.learning_rate:.3g} x {factor}"
    if optimizer.warmup_steps:
        text += f", after {optimizer.warmup_steps:,} steps of warm-up"
    return text if optimizer.schedule == "constant" else f"{text}, then falling to 0 ({optimizer.schedule})"
