"""What every run has, whichever its task: `Config` and its sections. `--keys` prints every key."""

from typing import Annotated, Literal

from pydantic import Field

from ..data.config import BatchesConfig
from ..settings import Number, Precision, Text, choice, key, section

STEPS = 10**9  # the longest run, and the latest step at which anything can happen
LARGE = 1e6  # the largest weight of a term, and the largest value of a latent
Shares = tuple[Annotated[Number, Field(ge=0, le=1)], ...]


@section
class OptimizerConfig:
    """AdamW. The learning rate is for `reference_batch` samples a step and scaled to the real number by rule."""

    name: Literal["adamw"] = choice("adamw", "the optimizer")
    learning_rate: float = key(1e-4, "for a step of reference_batch samples", above=0, high=100)
    betas: Shares = key((0.9, 0.99), "of Adam: decay of the first and of the second moment")
    weight_decay: float = key(0.0, "decoupled, of all weights", low=0, high=100)
    warmup_steps: int = key(0, "the rate rises linearly over so many steps", low=0, high=STEPS)
    schedule: Literal["constant", "linear", "cosine"] = choice(
        "constant", "how the rate goes on until train.steps"
    )
    gradient_clip: float | None = key(
        1.0, "largest norm of the gradient; null does not clip", above=0, high=LARGE
    )
    scale_rule: Literal["none", "linear", "sqrt"] = choice(
        "none", "how the rate grows with the samples a step over reference_batch"
    )
    reference_batch: int = key(1, "the samples a step that learning_rate is written for", low=1, high=10**6)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}; allowed: two numbers in [0, 1)")


@section
class EMAConfig:
    """Exponential moving average of the weights: what is validated and exported where it is enabled."""

    enabled: bool = key(True, "keep the average")
    decay: float = key(0.999, "of the average, a step", low=0, high=1)


@section
class TrainConfig:
    """How long, and how a step is computed."""

    steps: int = key(1000, "optimizer steps of the whole run", low=1, high=STEPS)
    gradient_accumulation: int = key(1, "micro-batches a step, one after another", low=1, high=10**4)
    mixed_precision: Precision = choice(
        "no", "compute in this type; weights, losses and the average stay float32"
    )
    compile: bool = key(False, "torch.compile for the networks")
    bf16_gradients: bool = key(False, "ranks send one another gradients in bf16, for slow links")
    max_bad_steps: int = key(20, "non-finite gradients in a row that end the run", low=1, high=STEPS)
    profile: bool = key(False, "write a trace of five steps and a table of what they spend their time on")


@section
class LogConfig:
    """metrics.jsonl, TensorBoard and other trackers."""

    every: int = key(50, "steps between two lines", low=1, high=STEPS)
    tensorboard: bool = key(True, "write for TensorBoard, too; so does naming it in log.trackers")
    trackers: tuple[Text, ...] = key(
        (),
        "others that accelerate knows, with pictures, such as wandb, mlflow, aim, or that a plugin registers",
    )

    @property
    def all_trackers(self) -> tuple[str, ...]:
        """Those named, and TensorBoard unless it is switched off and not named."""
        board = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*board, *self.trackers)))


@section
class ValidationConfig:
    """Measures and pictures of the held-out data."""

    every: int = key(
        1000, "steps between two measurements; 0: at the start and the end alone", low=0, high=STEPS
    )
    batch_size: int = key(4, "images at a time", low=1, high=10**4)
    pictures: int = key(4, "images in the picture of the model at work", low=1, high=1000)


@section
class CheckpointConfig:
    """All that the next step depends on, on disk."""

    every: int = key(1000, "steps between two checkpoints", low=1, high=STEPS)
    keep_last: int = key(2, "the newest so many stay", low=1, high=STEPS)
    keep_every: int | None = key(None, "and so does each whose step is a multiple of this", low=1, high=STEPS)


@section
class ResumeConfig:
    """What becomes of a run folder that is used again."""

    force: bool = key(False, "go on with a run whose data, seed or network the configuration has changed")


@section
class Config:
    """A whole run. Each task has a subclass with sections of its own, see `tasks.py`."""

    task: str = choice("autoencoder", "what is trained; the keys of data, and those beside it, are its own")
    output_dir: str = key(..., "the run's folder; running into it again continues")
    data: BatchesConfig = Field()
    plugins: tuple[Text, ...] = key(
        (), "modules of yours that are imported first and bring parts of their own"
    )
    seed: int = key(0, "of weights, order, crops and noise", low=0, high=2**64 - 1)
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
