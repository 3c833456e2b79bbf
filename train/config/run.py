"""`Config` and the sections that every run has, whatever its task. `--keys` prints every key."""

from typing import Annotated, Literal

from pydantic import Field

from ..data.config import BatchesConfig
from ..settings import Number, Precision, Text, choice, key, section

STEPS = 10**9  # upper bound of all keys that count steps
LARGE = 1e6  # upper bound of weights of terms, and of values of latents
Shares = tuple[Annotated[Number, Field(ge=0, le=1)], ...]


@section
class OptimizerConfig:
    """AdamW. `learning_rate` is for `reference_batch` samples a step; `scale_rule` scales it to the real batch."""

    name: Literal["adamw"] = choice("adamw", "the optimizer")
    learning_rate: float = key(1e-4, "for a step of reference_batch samples", above=0, high=100)
    betas: Shares = key((0.9, 0.99), "of Adam: decay of the first and of the second moment")
    weight_decay: float = key(0.0, "decoupled weight decay, of all weights", low=0, high=100)
    warmup_steps: int = key(0, "the rate rises linearly over so many steps", low=0, high=STEPS)
    schedule: Literal["constant", "linear", "cosine"] = choice(
        "constant",
        "how the rate falls from the end of the warm-up to train.steps; linear and cosine end at 0",
    )
    gradient_clip: float | None = key(
        1.0, "largest norm of the gradient, to which it is clipped; null: no clipping", above=0, high=LARGE
    )
    scale_rule: Literal["none", "linear", "sqrt"] = choice(
        "none", "how the rate is scaled by (samples a step) / reference_batch"
    )
    reference_batch: int = key(1, "the samples a step for which learning_rate is given", low=1, high=10**6)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}; allowed: two numbers in [0, 1)")


@section
class EMAConfig:
    """Exponential moving average of the weights; if it is enabled, it is what is validated and exported."""

    enabled: bool = key(True, "keep the average, and validate and export it in place of the weights")
    decay: float = key(0.999, "of the average, a step", low=0, high=1)


@section
class TrainConfig:
    """How long the run is, and how a step is computed."""

    steps: int = key(1000, "optimizer steps of the whole run", low=1, high=STEPS)
    gradient_accumulation: int = key(
        1, "micro-batches a step, on each rank, one after another", low=1, high=10**4
    )
    mixed_precision: Precision = choice(
        "no", "compute in this type; weights, losses and the average stay float32"
    )
    compile: bool = key(False, "torch.compile for the networks")
    bf16_gradients: bool = key(False, "exchange gradients between ranks in bf16, for slow links")
    max_bad_steps: int = key(
        20, "the run ends after so many steps in a row with gradients that are not finite", low=1, high=STEPS
    )
    profile: bool = key(
        False, "profile five steps: write a trace and a table of the time that each part takes"
    )


@section
class LogConfig:
    """Logs: metrics.jsonl, TensorBoard and other trackers."""

    every: int = key(50, "steps between two lines of metrics.jsonl", low=1, high=STEPS)
    tensorboard: bool = key(
        True, "write for TensorBoard; if false, it is still written if log.trackers names it"
    )
    trackers: tuple[Text, ...] = key(
        (),
        "other trackers that accelerate has, such as wandb, mlflow, aim, or that a plugin registers",
    )

    @property
    def all_trackers(self) -> tuple[str, ...]:
        """The names of all trackers: `trackers`, and TensorBoard unless `tensorboard` is false."""
        board = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*board, *self.trackers)))


@section
class ValidationConfig:
    """Measure the model on held-out data, and draw pictures."""

    every: int = key(
        1000, "steps between two validations; 0: only at the start and the end", low=0, high=STEPS
    )
    batch_size: int = key(4, "held-out images that are computed at a time", low=1, high=10**4)
    pictures: int = key(4, "number of images in the picture that is written", low=1, high=1000)


@section
class CheckpointConfig:
    """Save everything that the next step depends on."""

    every: int = key(1000, "steps between two checkpoints", low=1, high=STEPS)
    keep_last: int = key(2, "keep so many of the newest checkpoints", low=1, high=STEPS)
    keep_every: int | None = key(
        None, "keep also each checkpoint whose step is a multiple of this", low=1, high=STEPS
    )


@section
class ResumeConfig:
    """How to continue a run in a folder that is used again."""

    force: bool = key(
        False, "continue a run even if its data, seed or network differ from this configuration"
    )


@section
class Config:
    """A whole run. Each task has a subclass with sections of its own, see `tasks.py`."""

    task: str = choice(
        "autoencoder", "what is trained; each task has its own keys of data and further sections"
    )
    output_dir: str = key(..., "the run's folder; another start with the same folder continues the run")
    data: BatchesConfig = Field()
    plugins: tuple[Text, ...] = key((), "your own modules, imported first, which register further parts")
    seed: int = key(0, "of weights, order, crops and noise", low=0, high=2**64 - 1)
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
