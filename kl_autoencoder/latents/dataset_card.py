"""The README.md of a data set of latents: its content, the model that encoded it, and code to read it."""

from ..models.scaling import described, rounded

# The head has no `configs`: with them, `datasets` confuses the folder with another of the same name in its cache.
CARD = """---
tags: [latents, latent-diffusion]
---

# Latents of {rows:,} images

Written by `kl-autoencoder encode-dataset`: {content} of `{source}`, {seen:,} photographs, of which {small:,} were
too small and {unreadable:,} unreadable. Settings: crop {crop}, size {size}. Encoded by `{model}`, whose weights
have a SHA-256 that begins with {hash}.

`{content}` are the bytes of a tensor of the row's `shape`{halves}, in its `dtype`:

```python
import torch
from datasets import load_dataset

row = load_dataset("path/to/this/folder", split="train")[0]
{content} = torch.frombuffer(bytearray(row["{content}"]), dtype=getattr(torch, row["dtype"])).view(row["shape"])
```

{found}
"""
LATENTS = """They are raw: not scaled. Scaled{drawn} they come of

    kl_autoencoder.LatentDataset("path/to/this/folder", vae.scaling)

| over all images | {channels} |
|---|{lines}
| mean | {mean} |
| standard deviation | {std} |

Over all channels together: {scaling}. The model's own config said: {before}."""
CODES = """They are numbers of a code book of {codes:,} codes, of which {used:,} are used; exp of the entropy
of their use, the perplexity, is {perplexity:.1f}. `vae.decode_indices` decodes them."""


def dataset_card(manifest: dict) -> str:
    """Render the card of a finished data set from its manifest alone."""
    settings, made_from = manifest["settings"], manifest["made_from"]
    moments = settings["content"] == "moments"
    return CARD.format(
        rows=manifest["rows"],
        content=settings["content"],
        source=made_from["source"],
        seen=manifest["source"]["rows"],
        small=manifest["skipped"]["too small"],
        unreadable=manifest["skipped"]["unreadable"],
        model=made_from["model"],
        hash=manifest["model"]["weights_sha256"][:16],
        crop=settings["crop"],
        size=settings["size"],
        halves=" (the mean, then the logarithm of the variance)" if moments else "",
        found=_codes(manifest) if settings["content"] == "codes" else _latents(manifest, moments),
    )


def _codes(manifest: dict) -> str:
    return CODES.format(**manifest["statistics"])


def _latents(manifest: dict, moments: bool) -> str:
    found = manifest["statistics"]
    channels = len(found["mean"])
    return LATENTS.format(
        drawn=", and drawn from the moments anew in each epoch," if moments else "",
        channels=" | ".join(f"channel {i}" for i in range(channels)),
        lines="---|" * channels,
        mean=" | ".join(map(rounded, found["mean"])),
        std=" | ".join(map(rounded, found["std"])),
        scaling=described(found),
        before=described(manifest["made_from"]["scaling"]),
    )
