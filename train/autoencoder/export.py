"""The finished model as a folder for diffusion pipelines, with a model card; and published on the hub."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from kl_autoencoder.latents.statistics import LatentStatistics
from kl_autoencoder.models.autoencoder import Autoencoder
from kl_autoencoder.models.autoencoder_kl import ExactAutoencoder
from kl_autoencoder.models.publishing import hub
from kl_autoencoder.models.publishing.hub_card import data_name, shareable
from kl_autoencoder.models.publishing.repository import write_repository

from ..config import AutoencoderConfig, ExportConfig, to_yaml
from ..one_network.exporting import write_folder
from .adversarial.training_state import save_training_state

DRY = "published"  # in the run's folder: what would be on the hub
CARD = """---
library_name: diffusers
tags: [autoencoder, vae, latent-diffusion]
---

# {name}

{what}: images of {size}x{size} (any multiple of {f}) to latents of
{latent}x{latent}x{channels}; {parameters:.2f} M parameters. It loads in {loads_in}:

```python
from {package} import {class_name}
vae = {class_name}.from_pretrained("{folder}")  # the folder that this page is in
```

## Data

Trained on `{data}`, {samples:,} samples (random crops of {size}x{size}); measured on {held_out}
held-out images, centre crops of {size}x{size}.

## Measured quality

Posterior mode, 8 bits, {weights}.

| | PSNR (dB) | SSIM | LPIPS ({lpips_net}) |
|---|---|---|---|
{rows}

{latents}

## Recipe

```yaml
{recipe}```

Generated from the run's own records. What it is not for: images unlike its training data, and anything where a
reconstruction must be exact (text, medical or legal evidence).
"""


def export(
    folder: Path,
    vae: ExactAutoencoder | Autoencoder,
    config: AutoencoderConfig,
    facts: dict,
    training_state=None,
) -> None:
    """Write `folder` (diffusers layout and README.md), complete or not at all; an earlier one is replaced.

    facts: step, samples, held_out (number of images), statistics (LatentStatistics), and the metrics
    `before` and `after`. training_state: the discriminator's tensors, where they are kept beside the model.
    """

    def write(beside: Path) -> None:
        vae.save_pretrained(beside)
        (beside / "README.md").write_text(model_card(folder, vae, config, facts), encoding="utf-8")
        if training_state is not None:
            save_training_state(beside, training_state)

    write_folder(folder, write, facts["step"], facts["samples"])


def check_push(config: ExportConfig, vae: ExactAutoencoder | Autoencoder) -> None:
    """ValueError, before the first step, for a run that could not publish what it will have trained."""
    if config.push_to and isinstance(vae, Autoencoder):
        raise ValueError(
            f"export.push_to: {config.push_to!r}; allowed: for models that diffusers has a class for"
        )
    if config.push_to and not config.dry_run:
        try:
            hub.check_token(config.push_to)
        except ValueError as error:
            raise ValueError(f"export.push_to: {error}") from error


def push(vae: ExactAutoencoder, run: Path, config: ExportConfig) -> str:
    """Publish `vae` with the records of the run's folder; the address of its page, or in a dry run the folder.

    OSError, which says what remains to do, for what the hub refuses.
    """
    if config.dry_run:
        write_repository(vae, run / DRY, config.push_to, config.license, run)
        return str(run / DRY)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(vae, folder, config.push_to, config.license, run)
        try:
            return hub.publish(folder, config.push_to, config.private)
        except ValueError as error:
            again = f"kl-autoencoder push {run} --to {config.push_to}"
            raise OSError(f"export.push_to: {error}; the export is whole, and `{again}` pushes it") from error


def model_card(
    folder: Path, vae: ExactAutoencoder | Autoencoder, config: AutoencoderConfig, facts: dict
) -> str:
    size, f = config.data.resolutions[0], vae.downsampling
    return CARD.format(
        name=config.output_dir.rstrip("/").rsplit("/", 1)[-1],
        folder=folder.name,
        size=size,
        f=f,
        latent=size // f,
        channels=vae.config.latent_channels,
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        data=data_name(asdict(config)),
        samples=facts["samples"],
        held_out=facts["held_out"],
        weights="the EMA weights" if config.ema.enabled else "the last weights",
        lpips_net=config.validation.lpips_net,
        rows="\n".join(_row(name, facts[name]) for name in ("before", "after")),
        **_described(vae),
        latents=_latents(vae, facts["statistics"]),
        recipe=shareable(to_yaml(config)),
    )


def _described(vae: ExactAutoencoder | Autoencoder) -> dict[str, str]:
    """What the model is, and what it loads with."""
    if not isinstance(vae, Autoencoder):
        name = vae.stands_for.__name__
        what = "A KL-regularised autoencoder"
        return {"what": what, "loads_in": "plain diffusers", "package": "diffusers", "class_name": name}
    kind, network = vae.config.bottleneck["kind"], "fully connected" if vae.is_mlp else "convolutional"
    given = f", conditional on {vae.config.classes} classes" if vae.config.classes else ""
    what = f"An autoencoder with the bottleneck `{kind}`, {network}{given}"
    name = type(vae).__name__
    return {"what": what, "loads_in": "this package", "package": "kl_autoencoder", "class_name": name}


def _latents(vae: ExactAutoencoder | Autoencoder, statistics: LatentStatistics) -> str:
    mean, std = _numbers(statistics.mean), _numbers(statistics.std)
    if "patch_size" in vae.scaling:
        p, q = vae.scaling["patch_size"]
        return (
            f"Pipelines normalise {p}x{q} patches of latents by `bn.running_mean` and `bn.running_var`.\n"
            f"Those of the training data: mean {mean}, standard deviation {std} a channel."
        )
    return (
        f"Latents of the training data: mean {mean}, standard deviation {std} a channel; `scaling_factor` "
        f"{vae.config.scaling_factor:.6g}\nmakes their common deviation one."
    )


def _row(name: str, metrics: dict) -> str:
    if not metrics:  # those before training are lost with metrics.jsonl
        return f"| {name} training | not recorded | | |"
    ssim, lpips = (f"{metrics[m]:.3f}" if m in metrics else "not measured" for m in ("ssim", "lpips"))
    return f"| {name} training | {metrics['psnr']:.2f} | {ssim} | {lpips} |"


def _numbers(values) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
