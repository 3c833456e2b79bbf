"""What shrinks in the recipe of a prior over codes: batch and transformer. Its autoencoder has to be there."""

from dataclasses import replace

from ..config import CodePriorConfig


def shrink(config: CodePriorConfig) -> CodePriorConfig:
    """The same recipe with small sections of its own."""
    data, model = config.data, config.model
    return replace(
        config,
        data=replace(data, batch_size=min(data.batch_size, 2), validation_images=2),
        model=replace(model, hidden_size=8 * model.heads, layers=min(model.layers, 2)),
        validation=replace(config.validation, pictures=min(config.validation.pictures, 2)),
    )


def replaced(before: CodePriorConfig, after: CodePriorConfig) -> list[str]:
    """Nothing is left untested."""
    return []
