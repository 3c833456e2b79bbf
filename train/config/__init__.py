"""The configuration of a run: frozen sections, read from YAML, overridden from the command line, all checked."""

from .reading import build, dotted, load_config, to_yaml
from .schema import (
    AdversarialConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EMAConfig,
    ExportConfig,
    KLConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptualConfig,
    ResumeConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "AdversarialConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EMAConfig",
    "ExportConfig",
    "KLConfig",
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
