"""The README.md beside an exported entropy model."""

from dataclasses import asdict

from kl_autoencoder.models.folder import ENTROPY_MODEL
from kl_autoencoder.models.publishing.hub_card import data_name, shareable, without_path

from ..config import EntropyModelConfig, to_yaml

CARD = """# An entropy model for `{autoencoder}`

`{file}`, put into the folder of the autoencoder, is what `kl-autoencoder compress` codes its latents with.

Trained on `{data}`, {samples:,} crops of {size}x{size}. Bits a pixel of {held_out} held-out images, squares of
{held_size}x{held_size}, by the model's own cross-entropy:

| | {names} |
|---|{rules}|
{rows}

## Recipe

```yaml
{recipe}```
"""


def card(config: EntropyModelConfig, facts: dict) -> str:
    """The text of README.md. facts: samples, held_out (number of images), metrics `before` and `after` training."""
    names = list(facts["after"])
    rows = [
        f"| {when} training | {' | '.join(f'{value:.4f}' for value in facts[when].values())} |"
        for when in ("before", "after")
        if facts[when]
    ]
    return CARD.format(
        autoencoder=without_path(config.model.pretrained),
        file=ENTROPY_MODEL,
        data=data_name(asdict(config)),
        samples=facts["samples"],
        size=config.data.resolutions[0],
        held_out=facts["held_out"],
        held_size=config.data.held_out_side,
        names=" | ".join(names),
        rules="|".join("---" for _ in names),
        rows="\n".join(rows),
        recipe=shareable(to_yaml(config)),
    )
