"""The model card of a published model: metadata that the hub reads, and a page for people.

It contains no path of this machine: of a data set, run or model in a local folder it has only the last part.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..folder import HUB_ID
from ..run_folder import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from ..autoencoder_kl import ExactAutoencoder

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")  # identifiers of licenses on the hub
PICTURE = "reconstructions.png"
SECTIONS = ("model", "loss", "optimizer", "ema", "train")  # of a run's config.yaml that make up its recipe
METRICS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
CARD = """---
{metadata}
---

# {name}

A KL-regularised autoencoder: images of any multiple of {f} a side to latents of 1/{f} a side and {channels}
channels; {parameters:.2f} M parameters, made for {size}x{size}. It loads in plain diffusers:

```python
from diffusers import {class_name}

vae = {class_name}.from_pretrained("{repo}")
```

or, faster and at any size without seams, with `from kl_autoencoder import {class_name_here}`.
{quality}{recipe}
What it is not for: images unlike its training data, and anything where a reconstruction must be exact (text,
medical or legal evidence).
"""


def model_card(vae: "ExactAutoencoder", repo: str, license: str | None, run: Path | None) -> str:
    """Return the README.md of the repository `repo` (owner/name), with metrics and recipe of a run's folder."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}
    measured = last_validation(run) if run else {}
    size, f = vae.config.sample_size, vae.downsampling
    return CARD.format(
        metadata=_metadata(repo, license, config, measured),
        name=repo.partition("/")[2],
        repo=repo,
        f=f,
        size=size if isinstance(size, int) else size[0],
        channels=vae.config.latent_channels,
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        class_name=vae.stands_for.__name__,
        class_name_here=type(vae).__qualname__,
        quality=_quality(config, measured, picture=bool(run and newest_picture(run))),
        recipe=_recipe(config),
    )


def last_validation(run: Path) -> dict[str, float]:
    """Return the METRICS of a run's last validation, by name, without those that were not measured."""
    found: dict[str, float] = {}
    for values in read_metrics(run / METRICS_FILE):
        measured = {name: values.get(f"validation/{name}") for name in METRICS}
        measured = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
        found = measured or found
    return found


def newest_picture(run: Path) -> Path | None:
    """Return the last picture of originals and reconstructions that a run saved, or None."""
    return max(run.glob("samples/step-*.png"), default=None)


def _metadata(repo: str, license: str | None, config: dict, measured: Mapping[str, float]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = dataset_id(config)
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="reconstruction",
            dataset_type=data or "image-folder",
            dataset_name=f"held-out images of {data_name(config)}",
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=round(value, 4),
        )
        for name, value in measured.items()
    ]
    start = (config.get("model") or {}).get("pretrained")
    card = ModelCardData(
        license=license,
        library_name="diffusers",
        tags=["autoencoder", "vae", "latent-diffusion"],
        datasets=[data] if data else None,
        base_model=start if is_hub_id(start) else None,
        model_name=repo.partition("/")[2],
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def dataset_id(config: Mapping[str, Any]) -> str | None:
    """Return the hub id (owner/name) of the data set that a run was trained on; None if it is not on the hub."""
    train = str((config.get("data") or {}).get("train") or "")
    train = train.removeprefix("hf://datasets/")
    found = re.match(HUB_ID.pattern, train)
    return found[0] if found and is_hub_id(re.split("[:@]", train)[0]) else None


def is_hub_id(name: object) -> bool:
    """Whether a name has the form owner/name and is no local path."""
    return isinstance(name, str) and bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def data_name(config: Mapping[str, Any]) -> str:
    """Return the name of the data set that a run was trained on: its hub id, or the last part of its path."""
    return dataset_id(config) or without_path(str((config.get("data") or {}).get("train") or "its data"))


def without_path(value: Any) -> Any:
    """Return a value of a configuration with only the last part of each path and URL; hub ids stay whole."""
    if isinstance(value, dict):
        return {key: without_path(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_path(entry) for entry in value]
    if isinstance(value, str) and not is_hub_id(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def shareable(recipe: str) -> str:
    """Return the YAML of a configuration with only the last part of each path."""
    return yaml.safe_dump(without_path(yaml.safe_load(recipe)), sort_keys=False)


def _quality(config: Mapping[str, Any], measured: Mapping[str, float], picture: bool) -> str:
    lines: list[str] = []
    if picture:
        lines += ["", f"![originals, reconstructions and their differences]({PICTURE})"]
    if measured:
        shown = {
            name: f"{value:.2f}" if name == "psnr" else f"{value:.3f}" for name, value in measured.items()
        }
        resolution = (config.get("data") or {}).get("resolution")
        net = (config.get("validation") or {}).get("lpips_net")
        titles = [f"LPIPS ({net})" if name == "lpips" and net else METRICS[name] for name in shown]
        lines += ["", "## Measured quality", ""]
        lines += [
            f"Posterior mode, 8 bits, held-out images of {data_name(config)}, {resolution}x{resolution}.",
            "",
        ]
        lines += [_row(titles), "|---" * len(shown) + "|", _row(shown.values())]
    return "\n".join([*lines, ""])


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _recipe(config: Mapping[str, Any]) -> str:
    kept = {name: without_path(config[name]) for name in SECTIONS if name in config}
    if not kept:
        return ""
    text = yaml.safe_dump(kept, sort_keys=False)
    return f"\n## Recipe\n\nTrained on {data_name(config)}.\n\n```yaml\n{text}```\n"
