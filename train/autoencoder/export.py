"""Write the finished model as a folder for diffusion pipelines, with a model card, and publish it on the hub."""

import tempfile
from collections.abc import Callable
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

DRY_RUN_FOLDER = "published"  # of the run: `export.dry_run` writes here what would be published
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
    save_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `folder` (diffusers layout and README.md), complete or not at all; an earlier one is replaced.

    facts: step, samples, held_out (number of images), statistics (LatentStatistics), and the metrics `before` and
    `after` training. training_state: the discriminator's tensors (`Adversary.tensors`), to keep them beside the
    model; None: do not. save_more: writes further files into the folder that it gets. Raises OSError, which names
    the folder, if it cannot be written.
    """

    def write(beside: Path) -> None:
        vae.save_pretrained(beside)
        (beside / "README.md").write_text(model_card(folder, vae, config, facts), encoding="utf-8")
        if training_state is not None:
            save_training_state(beside, training_state)
        save_more(beside)

    write_folder(folder, write, facts["step"], facts["samples"])


def check_push(config: ExportConfig, vae: ExactAutoencoder | Autoencoder) -> None:
    """Raise ValueError, before the first step, if the trained model could not be published at the end."""
    if config.push_to and isinstance(vae, Autoencoder):
        raise ValueError(
            f"export.push_to: {config.push_to!r}; allowed: for models that diffusers has a class for"
        )
    if config.push_to and not config.dry_run:
        try:
            hub.check_token(config.push_to)
        except ValueError as error:
            raise ValueError(f"export.push_to: {error}") from error


def push(vae: ExactAutoencoder, exported: Path, config: ExportConfig) -> str:
    """Publish `vae` with the records of its run; returns the address of its page, or a dry run's folder.

    exported: the folder of `export`, within the run's.
    Raises OSError, which says how to publish it later, if the hub refuses it.
    """
    run = exported.parent
    described = (config.push_to, config.license, run, exported)
    if config.dry_run:
        write_repository(vae, run / DRY_RUN_FOLDER, *described)
        return str(run / DRY_RUN_FOLDER)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(vae, folder, *described)
        try:
            return hub.publish(folder, config.push_to, config.private)
        except ValueError as error:
            again = f"kl-autoencoder push {run} --to {config.push_to}"
            raise OSError(f"export.push_to: {error}; the export is whole, and `{again}` pushes it") from error


def model_card(
    folder: Path, vae: ExactAutoencoder | Autoencoder, config: AutoencoderConfig, facts: dict
) -> str:
    """The text of README.md; `folder` is named in its example, `facts` as in `export`."""
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
        **_model_fields(vae),
        latents=_latents_text(vae, facts["statistics"]),
        recipe=shareable(to_yaml(config)),
    )


def _model_fields(vae: ExactAutoencoder | Autoencoder) -> dict[str, str]:
    """The fields of `CARD` that say what the model is, and by which class of which package it is loaded."""
    if not isinstance(vae, Autoencoder):
        name = vae.stands_for.__name__
        what = "A KL-regularised autoencoder"
        return {"what": what, "loads_in": "plain diffusers", "package": "diffusers", "class_name": name}
    kind, network = vae.config.bottleneck["kind"], "fully connected" if vae.is_mlp else "convolutional"
    given = f", conditional on {vae.config.classes} classes" if vae.config.classes else ""
    what = f"An autoencoder with the bottleneck `{kind}`, {network}{given}"
    name = type(vae).__name__
    return {"what": what, "loads_in": "this package", "package": "kl_autoencoder", "class_name": name}


def _latents_text(vae: ExactAutoencoder | Autoencoder, statistics: LatentStatistics) -> str:
    mean, std = _numbers(statistics.mean), _numbers(statistics.std)
    if "patch_size" in vae.scaling:
        p, q = vae.scaling["patch_size"]
        return (
            f"Pipelines normalise {p}x{q} patches of latents by `bn.running_mean` and `bn.running_var`.\n"
            f"Those of the training data: mean {mean}, standard deviation {std} a channel."
        )
    return (
        f"Latents of the training data: mean {mean}, standard deviation {std} a channel; `scaling_factor` "
        f"{vae.config.scaling_factor:.6g}\n"
        f"makes their common deviation {vae.config.scaling_factor / statistics.scaling_factor:.3g}."
    )


def _row(name: str, metrics: dict) -> str:
    if not metrics:  # the metrics before training are lost if a continued run has no metrics.jsonl
        return f"| {name} training | not recorded | | |"
    ssim, lpips = (f"{metrics[m]:.3f}" if m in metrics else "not measured" for m in ("ssim", "lpips"))
    return f"| {name} training | {metrics['psnr']:.2f} | {ssim} | {lpips} |"


def _numbers(values) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
