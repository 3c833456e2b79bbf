"""Shrink the recipe of a prior over codes: batch and transformer. Its autoencoder has to exist."""

from dataclasses import replace

from ..config import CodePriorConfig


def shrink(config: CodePriorConfig) -> CodePriorConfig:
    """Return the same recipe with the sections of this task made small."""
    data, model = config.data, config.model
    return replace(
        config,
        data=replace(data, batch_size=min(data.batch_size, 2), validation_images=2),
        model=replace(model, hidden_size=8 * model.heads, layers=min(model.layers, 2)),
        validation=replace(config.validation, pictures=min(config.validation.pictures, 2)),
    )


def replaced(before: CodePriorConfig, after: CodePriorConfig) -> list[str]:
    """Return no lines: nothing is left untested."""
    return []
