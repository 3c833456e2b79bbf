"""The configuration of a run: frozen dataclasses, read from YAML, overridden from the command line, all checked.

Every error is a ValueError that names the key, the value and what is allowed.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .data.loader import DataConfig

STEPS = 10**9  # the longest run, and the latest step at which anything can happen
LARGE = 1e6  # the largest weight of a term, and the largest value of a latent
WIDEST, DEEPEST, LEVELS = 65536, 32, 10  # of networks: channels, ResNet blocks a level, levels


def number(default, high, low=None, above=None) -> Any:
    """A field whose value, or each value of a tuple, must be >= low, > above (where they are given) and <= high."""
    return field(default=default, metadata={"low": low, "above": above, "high": high})


@dataclass(frozen=True)
class ModelConfig:
    """A diffusers AutoencoderKL configuration, or `pretrained`: a folder, single file, hub id or
    "compact" to start from.

    What is left out is what AutoencoderKL's default or the pretrained model says. `scaling_factor` is measured
    at the end of the training in any case. `start` is what a new network computes: nothing (random numbers), or
    the shrunk image enlarged again (see `start.start_as_enlargement`), which saves much of a short training.
    """

    pretrained: str | None = None
    subfolder: str | None = None
    start: Literal["random", "enlargement"] = "random"
    in_channels: int | None = number(None, low=1, high=WIDEST)
    out_channels: int | None = number(None, low=1, high=WIDEST)
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    block_out_channels: tuple[int, ...] | None = number(None, low=1, high=WIDEST)
    layers_per_block: int | None = number(None, low=1, high=DEEPEST)
    act_fn: str | None = None
    latent_channels: int | None = number(None, low=1, high=WIDEST)
    norm_num_groups: int | None = number(None, low=1, high=WIDEST)
    sample_size: int | None = number(None, low=1, high=WIDEST)
    scaling_factor: float | None = number(None, above=0, high=LARGE)
    shift_factor: float | None = number(None, low=-LARGE, high=LARGE)
    latents_mean: tuple[float, ...] | None = number(None, low=-LARGE, high=LARGE)
    latents_std: tuple[float, ...] | None = number(None, above=0, high=LARGE)
    force_upcast: bool | None = None
    use_quant_conv: bool | None = None
    use_post_quant_conv: bool | None = None
    mid_block_add_attention: bool | None = None

    def network(self) -> dict[str, Any]:
        """The AutoencoderKL keys that were given."""
        given = dataclasses.asdict(self)
        return {
            key: value
            for key, value in given.items()
            if value is not None and key not in ("pretrained", "subfolder", "start")
        }

    def __post_init__(self):
        levels = len(self.block_out_channels or (1,))
        if not 1 <= levels <= LEVELS:
            raise ValueError(f"model.block_out_channels: {levels} levels; allowed: 1 to {LEVELS}")
        if self.pretrained is not None and self.network():
            raise ValueError(
                f"model.{next(iter(self.network()))}: given beside model.pretrained; allowed: one of the two "
                "(a pretrained model brings its own configuration)"
            )
        if self.pretrained is not None and self.start != "random":
            raise ValueError(
                f"model.start: {self.start} beside model.pretrained; allowed: one of the two "
                "(a pretrained model starts from its own weights)"
            )


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018). `required: false` lets a run go on without it, with a warning."""

    weight: float = number(1.0, low=0, high=LARGE)
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    required: bool = True


@dataclass(frozen=True)
class KLConfig:
    """`weight` multiplies the KL summed over an image, beside the reconstruction summed over it."""

    weight: float = number(1e-6, low=0, high=LARGE)
    warmup_steps: int = number(0, low=0, high=STEPS)
    free_bits: float = number(0.0, low=0, high=LARGE)


@dataclass(frozen=True)
class AdversarialConfig:
    """A patch discriminator against blur. `weight: 0` is a run without one.

    It trains from step `disc_start` on; the autoencoder feels it `disc_warmup_steps` later, its weight rising
    over `ramp_steps`. `adaptive` multiplies the weight by |grad nll| / |grad adversarial| (VQGAN).
    """

    weight: float = number(0.0, low=0, high=LARGE)
    loss: Literal["hinge", "logistic"] = "hinge"
    disc_start: int = number(50001, low=0, high=STEPS)
    disc_warmup_steps: int = number(0, low=0, high=STEPS)
    ramp_steps: int = number(0, low=0, high=STEPS)
    adaptive: bool = True
    lecam_weight: float = number(0.0, low=0, high=LARGE)
    r1_weight: float = number(0.0, low=0, high=LARGE)
    r1_every: int = number(16, low=1, high=STEPS)
    channels: int = number(64, low=1, high=4096)
    layers: int = number(3, low=1, high=10)
    learning_rate: float | None = number(None, above=0, high=100)  # None: the autoencoder's


@dataclass(frozen=True)
class LossConfig:
    reconstruction: Literal["l1", "l2", "gaussian", "laplace", "bernoulli"] = "l1"
    perceptual: PerceptualConfig = PerceptualConfig()
    kl: KLConfig = KLConfig()
    adversarial: AdversarialConfig = AdversarialConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate is for `reference_batch` samples a step and scaled to the real number by rule."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = number(1e-4, above=0, high=100)
    betas: tuple[float, ...] = number((0.9, 0.99), low=0, high=1)
    weight_decay: float = number(0.0, low=0, high=100)
    warmup_steps: int = number(0, low=0, high=STEPS)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    gradient_clip: float | None = number(1.0, above=0, high=LARGE)
    scale_rule: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = number(1, low=1, high=10**6)

    def __post_init__(self):
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}; allowed: two numbers in [0, 1)")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights; what is validated and exported where it is enabled."""

    enabled: bool = True
    decay: float = number(0.999, low=0, high=1)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = number(1000, low=1, high=STEPS)
    gradient_accumulation: int = number(1, low=1, high=10**4)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    # what the backward pass computes again: nothing, norms and SiLUs (cheap), whole blocks (a forward pass more)
    gradient_checkpointing: Literal["no", "norms", "blocks"] = "norms"
    decoder_only: bool = False
    bf16_gradients: bool = False  # what ranks send one another, for slow links
    max_bad_steps: int = number(20, low=1, high=STEPS)  # non-finite gradients in a row that end the run
    profile: bool = False


@dataclass(frozen=True)
class LogConfig:
    every: int = number(50, low=1, high=STEPS)
    tensorboard: bool = True


@dataclass(frozen=True)
class ValidationConfig:
    """PSNR, SSIM and LPIPS of the held-out images every so many steps (0: only at the start and the end)."""

    every: int = number(1000, low=0, high=STEPS)
    batch_size: int = number(4, low=1, high=10**4)
    lpips_net: Literal["vgg", "alex", "squeeze"] = "alex"
    pictures: int = number(4, low=1, high=1000)


@dataclass(frozen=True)
class CheckpointConfig:
    """Every so many steps; the newest `keep_last` and each whose step is a multiple of `keep_every` stay."""

    every: int = number(1000, low=1, high=STEPS)
    keep_last: int = number(2, low=1, high=STEPS)
    keep_every: int | None = number(None, low=1, high=STEPS)


@dataclass(frozen=True)
class ResumeConfig:
    """`force: true` goes on with a run whose data, seed or network the configuration has changed."""

    force: bool = False


@dataclass(frozen=True)
class Config:
    output_dir: str
    data: DataConfig
    seed: int = number(0, low=0, high=2**64 - 1)
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()

    def __post_init__(self):
        adversarial, steps = self.loss.adversarial, self.train.steps
        felt = adversarial.disc_start + adversarial.disc_warmup_steps
        if adversarial.weight and felt >= steps:
            raise ValueError(
                f"loss.adversarial.disc_start: {adversarial.disc_start} (felt from step {felt} on) in a run of "
                f"{steps} steps; allowed: below train.steps, or loss.adversarial.weight=0"
            )


# -------------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """A YAML file and `dotted.key=value` overrides -> Config. Raises ValueError or FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that Python refuses, too
        raise ValueError(f"{path}: not a YAML file ({_shown(' '.join(str(error).split()))})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; allowed: keys and values")
    for override in overrides:
        _apply(values, override)
    return build(Config, values)


def to_yaml(config: Config) -> str:
    """The whole resolved configuration; `load_config` reads it back to an equal one."""
    plain = dataclasses.asdict(config, dict_factory=lambda pairs: {k: _plain(v) for k, v in pairs})
    return yaml.safe_dump(plain, sort_keys=False)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override[:80]}: not an override; allowed: key=value, as in train.steps=200")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {'.'.join(parents[: depth + 1])} has no keys of its own")
    try:
        values[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(
            f"{key}: {_shown(text)} is not a YAML value; allowed: such as 3, true, null, [8, 16]"
        ) from None


def build(cls, values: Any, prefix: str = ""):
    """A dataclass from a mapping, strictly: unknown keys, wrong types and values out of range are refused."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')}: {_shown(values)}; allowed: keys and values")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            meant = f"did you mean {prefix}{near[0]}?" if near else f"allowed: {', '.join(hints)}"
            raise ValueError(f"{prefix}{str(key)[:80]}: no such key; {meant}")
    arguments = {}
    for spec in dataclasses.fields(cls):
        key = f"{prefix}{spec.name}"
        if spec.name in values:
            arguments[spec.name] = _convert(key, values[spec.name], hints[spec.name])
            _check_range(key, arguments[spec.name], spec.metadata)
        elif spec.default is dataclasses.MISSING:
            raise ValueError(f"{key}: not given, and it has no default")
    return cls(**arguments)


def _convert(key: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, key + ".")
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        # YAML reads a bare `no` as false
        value = "no" if value is False and "no" in typing.get_args(kind) else value
        if value not in typing.get_args(kind):
            raise ValueError(f"{key}: {_shown(value)}; allowed: {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: {_shown(value)}; allowed: a list")
        return tuple(_convert(f"{key}[{i}]", v, typing.get_args(kind)[0]) for i, v in enumerate(value))
    return _scalar(key, value, kind)


def _scalar(key: str, value: Any, kind: type) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(
            ValueError, OverflowError
        ):  # YAML 1.1 reads 1e-4 as text, for want of a point
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{key}: {_shown(value)}; allowed: a finite number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: {value}; allowed: a finite number")
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{key}: {_shown(value)}; allowed: {names[kind]}")
    return value


def _check_range(key: str, value: Any, bounds) -> None:
    if value is None or not bounds:
        return
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            _check_range(f"{key}[{i}]", part, bounds)
        return
    low, above, high = bounds["low"], bounds["above"], bounds["high"]
    if (low is not None and value < low) or (above is not None and value <= above) or value > high:
        allowed = [f"{word} {bound:,g}" if isinstance(bound, float) else f"{word} {bound:,}"
                   for word, bound in (("at least", low), ("above", above), ("at most", high))
                   if bound is not None]  # fmt: skip
        raise ValueError(f"{key}: {_shown(value)}; allowed: {' and '.join(allowed)}")


def _shown(value: Any) -> str:
    """A value as an error shows it, cut where it is longer than anybody reads."""
    if isinstance(value, int) and abs(value) > 10**40:  # repr refuses one of more than 4300 digits
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"
