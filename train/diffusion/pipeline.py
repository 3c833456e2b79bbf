"""Build the transformer, the autoencoder and the pipeline, all of diffusers' own classes."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, SchedulerMixin
from torch import Tensor, nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.latents.encode_dataset import weights_hash

from ..config.latent_diffusion import MOST_CLASSES, DiTConfig
from .latents import Latents

NO_CLASS = MOST_CLASSES  # the label by which `DiTPipeline` says "no class"


def build_transformer(config: DiTConfig, latents: Latents) -> DiTTransformer2DModel:
    """A new DiT for latents of this shape, initialised as adaLN-Zero: no block changes anything, and it predicts 0.

    With classes it has a table of 1000 and "no class", on which `DiTPipeline` relies for guidance. Raises
    ValueError, which names the key, if the latents are not square or their side is no multiple of `patch_size`.
    """
    channels, height, width = latents.shape
    if height != width or height % config.patch_size:
        raise ValueError(
            f"model.patch_size: {config.patch_size} for latents of {height}x{width}; allowed: squares, and a "
            "divisor of their side"
        )
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.hidden_size // config.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        sample_size=height,
        patch_size=config.patch_size,
        num_embeds_ada_norm=1 if latents.classes is None else MOST_CLASSES,
    )
    start_as_identity(transformer)
    return transformer.eval()  # in training mode diffusers would drop labels by an unseeded generator


@torch.no_grad()
def start_as_identity(transformer: DiTTransformer2DModel) -> None:
    """Set modulations and last layer to 0, and embeddings to small numbers (Peebles & Xie 2023, section 3.2)."""
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def load_autoencoder(name: str | None, latents: Latents) -> KLAutoencoder:
    """Load the autoencoder that encoded the data set, float32 on the CPU.

    name: folder, file or hub id; None for the one that the data set names. Raises ValueError, which names the key,
    if it cannot be loaded, is no AutoencoderKL, or has other weights than the one that encoded the data set.
    """
    name = name or latents.manifest.get("made_from", {}).get("model", "")
    try:
        vae = load_model(name, "cpu", None)
    except (ValueError, OSError) as error:
        raise ValueError(f"model.autoencoder: {name!r} cannot be loaded: {error}") from error
    if getattr(type(vae), "stands_for", None) is not AutoencoderKL:
        raise ValueError(
            f"model.autoencoder: {name!r}; allowed: an AutoencoderKL, whose latents DiTPipeline decodes"
        )
    if weights_hash(vae) != latents.manifest["model"]["weights_sha256"]:
        raise ValueError(
            f"model.autoencoder: {name!r} has other weights than the one that encoded {latents.folder}; "
            "allowed: that one"
        )
    return vae.float()


@torch.no_grad()
def with_normalised_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """A copy of `vae` as diffusers' AutoencoderKL, with latents (z - mean) / std, which decode to the same images.

    `DiTPipeline` only divides by `scaling_factor`; so mean and std (C values each) become part of the 1x1
    convolutions after the encoder and before the decoder. If W h + b are the moments of `vae`, those of the result
    are ((W h + b)_mean - mean) / std and (W h + b)_logvar - 2 log std. If `vae` decodes from W z + b, the result
    decodes from W (std z + mean) + b. scaling_factor is 1.
    """
    mean, std = mean.flatten().float(), std.flatten().float()
    own = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    own |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0, "shift_factor": None}
    own |= {"latents_mean": None, "latents_std": None}
    made = AutoencoderKL(**own)
    state = {name: tensor.float() for name, tensor in vae.state_dict().items()}
    channels = len(mean)
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        state.setdefault(f"{name}.weight", torch.eye(size).view(size, size, 1, 1))
        state.setdefault(f"{name}.bias", torch.zeros(size))
    before = torch.cat([1 / std, torch.ones(channels)])
    state["quant_conv.weight"] = state["quant_conv.weight"] * before.view(-1, 1, 1, 1)
    state["quant_conv.bias"] = (state["quant_conv.bias"] - torch.cat([mean, 2 * std.log()])) * before
    weight = state["post_quant_conv.weight"]
    state["post_quant_conv.bias"] = state["post_quant_conv.bias"] + weight[:, :, 0, 0] @ mean
    state["post_quant_conv.weight"] = weight * std.view(1, -1, 1, 1)
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def build_pipeline(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    classes: Sequence[Any] | None,
) -> DiTPipeline:
    """Build the pipeline, for `pipe(class_labels=[0, 1], guidance_scale=1.5).images`.

    classes: names in the order of their labels; with None, call it with the label 0 and guidance_scale 1.
    """
    names = {str(i): str(name) for i, name in enumerate(classes)} if classes is not None else None
    pipe = DiTPipeline(transformer, vae, scheduler, id2label=names)
    pipe.register_to_config(id2label=names)  # without this, save_pretrained would leave the names out
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: DiTPipeline, labels: Sequence[int], steps: int, guidance: float, seed: int) -> Tensor:
    """Sample images of the classes `labels` (length B): (B, 3, H, W) in [-1, 1], on the CPU.

    steps: of the scheduler. guidance: scale of classifier-free guidance, 1 for none. seed: of the noise.
    """
    drawn = pipe(
        class_labels=list(labels),
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return drawn.images.cpu() * 2 - 1
