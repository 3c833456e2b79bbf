"""The README.md of a trained pipeline."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kl_autoencoder.models.publishing.hub_card import data_name, shareable

from ..config import to_yaml

if TYPE_CHECKING:
    from .task import LatentDiffusionTask

CARD = """---
library_name: diffusers
tags: [diffusion, dit, latent-diffusion]
---

# {name}

A diffusion transformer of {parameters:.2f} M parameters on normalised latents of {side}x{side}x{channels},
with the autoencoder that they are of. It loads in plain diffusers:

```python
from diffusers import DiTPipeline
pipe = DiTPipeline.from_pretrained("{folder}")  # the folder that this page is in
images = pipe(class_labels={labels}, guidance_scale={guidance}, num_inference_steps={steps}).images
```

{classes}

## Training

{samples:,} samples of `{data}`, {weights}. Mean squared error of the prediction (`{prediction}`) on
held-out latents of deviation one: {before} before training, {after} after.

```yaml
{recipe}```
"""


def card(folder: Path, task: "LatentDiffusionTask", facts: dict) -> str:
    """The text of README.md; `folder` is named in its example, `facts` are those of `Task.export`."""
    config, classes = task.config, task.latents.classes
    channels, side, _ = task.latents.shape
    known = "It knows no classes: every label is 0."
    if classes is not None:
        known = "Classes: " + ", ".join(f"{i} ({name})" for i, name in enumerate(classes)) + "."
    before = facts["before"].get("loss")
    return CARD.format(
        name=config.output_dir.rstrip("/").rsplit("/", 1)[-1],
        parameters=sum(p.numel() for p in task.exported.parameters()) / 1e6,
        side=side,
        channels=channels,
        folder=folder.name,
        labels=[0, 0] if classes is None else [0, len(classes) - 1],
        guidance=1.0 if classes is None else 2.0,
        steps=config.validation.inference_steps,
        classes=known,
        samples=facts["samples"],
        data=data_name(asdict(config)),
        weights="the EMA weights" if config.ema.enabled else "the last weights",
        prediction=config.loss.prediction,
        before="not recorded" if before is None else f"{before:.4f}",
        after=f"{facts['after']['loss']:.4f}",
        recipe=shareable(to_yaml(config)),
    )
