"""The configuration of a run: frozen, checked sections, read from YAML and overridden from the command line."""

from .autoencoder import (
    AdversarialConfig,
    AutoencoderConfig,
    DataConfig,
    ExportConfig,
    KLConfig,
    LossConfig,
    ModelConfig,
    PerceptualConfig,
)
from .code_prior import CodePriorConfig
from .codec import EntropyModelConfig
from .latent_diffusion import LatentDiffusionConfig
from .reading import build, dotted, load_config, to_yaml
from .run import (
    CheckpointConfig,
    Config,
    EMAConfig,
    LogConfig,
    OptimizerConfig,
    ResumeConfig,
    TrainConfig,
    ValidationConfig,
)
from .tasks import TASKS

__all__ = [
    "TASKS",
    "AdversarialConfig",
    "AutoencoderConfig",
    "CheckpointConfig",
    "CodePriorConfig",
    "Config",
    "DataConfig",
    "EMAConfig",
    "EntropyModelConfig",
    "ExportConfig",
    "KLConfig",
    "LatentDiffusionConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PerceptualConfig",
    "ResumeConfig",
    "TrainConfig",
    "ValidationConfig",
    "build",
    "dotted",
    "load_config",
    "to_yaml",
]
