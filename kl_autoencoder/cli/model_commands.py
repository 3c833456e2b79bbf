"""What the commands of cli.py do, with arguments that checks.py has seen. ValueError or OSError."""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.image_io import (
    DIFFERENCE_GAIN,
    difference_image,
    image_grid,
    image_size,
    load_image,
    pad_to_multiple,
    save_image,
)
from ..files import temporary_beside
from ..latents.latent_files import load_latents, save_latents
from ..models import float16, float16_check, scaling
from ..models.autoencoder_kl import KLAutoencoder
from ..models.large_images import prepare_for
from ..models.single_file import family_of
from ..progress import tracked, write
from .loading import load_model
from .main import say

SAME_FUNCTION = 1e-4  # of the range of what a model gives


def encode(arguments: argparse.Namespace) -> None:
    """Photographs -> one file of latents, the posterior's mode or a sample of it."""
    photographs, output = arguments.photographs, arguments.output
    vae = load_model(arguments.model, arguments.device, arguments.dtype)
    latents, names, sizes, unread = [], [], [], []
    for i, images in _read(photographs, arguments.size, unread, "encoding", vae):
        with torch.inference_mode():
            posterior = vae.encode(_padded(images, vae)).latent_dist
            generator = torch.Generator(vae.device).manual_seed(arguments.seed + i)
            z = posterior.sample(generator) if arguments.sample else posterior.mode()
            z = vae.scale(z) if arguments.scaled else z
        if not z.isfinite().all():
            raise ValueError(f"{photographs[i][0]}: its latents are not finite; try --dtype float32")
        latents.append(z[0].cpu())
        names.append(photographs[i][1])
        sizes.append(tuple(images.shape[2:]))
    if latents:
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"config": vae.config, "model": arguments.model, "scaled": arguments.scaled}
        save_latents(output, latents, names, sizes, **about)
        print(f"{output}: {len(latents)} photograph{'s' * (len(latents) > 1)}")
    _refuse_unread(unread, photographs)


def decode(arguments: argparse.Namespace) -> None:
    """Files of latents -> photographs of their original sizes."""
    files = [(path, load_latents(path)) for path in arguments.latents]
    todo, models = tracked(arguments.targets, "decoding", "images"), {}
    for source, file in files:
        name = arguments.model or file.model
        if name not in models:
            models[name] = load_model(name, arguments.device, arguments.dtype)
        vae = models[name]
        for z, size, photograph in zip(file.raw(), file.sizes, file.names, strict=True):
            if z.shape[0] != vae.config.latent_channels:
                channels = f"{z.shape[0]} channels, {name} takes {vae.config.latent_channels}"
                raise ValueError(f"{source}: latents of {channels}")
            _prepare(vae, f"{source}: {photograph}", tuple(vae.downsampling * side for side in z.shape[1:]))
            with torch.inference_mode():
                images = vae.decode(z[None].to(vae.device, vae.dtype)).sample
            _write(images, next(todo), photograph, size)


def reconstruct(arguments: argparse.Namespace) -> None:
    """Photographs -> what the model makes of them, of the same size."""
    photographs, targets, unread = arguments.photographs, arguments.targets, []
    vae = load_model(arguments.model, arguments.device, arguments.dtype)
    for i, images in _read(photographs, arguments.size, unread, "reconstructing", vae):
        height, width = images.shape[2:]
        with torch.inference_mode():
            output = vae(_padded(images, vae)).sample[:, :, :height, :width].float().cpu()
        if arguments.compare:
            columns = [images, output, difference_image(images, output.clamp(-1, 1))]
            output = image_grid(columns, ["original", "reconstruction", f"difference x{DIFFERENCE_GAIN:g}"])
        _write(output, targets[i], photographs[i][1])
    _refuse_unread(unread, photographs)


def export(arguments: argparse.Namespace) -> None:
    """A training run or any model -> a diffusers folder or an LDM single file."""
    output, folder = arguments.output, arguments.folder
    vae = load_model(arguments.model, "cpu", arguments.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.single_file:
        vae.save_single_file(output)
    else:
        _export_folder(vae, output, model_card=folder / "README.md" if folder else None)
    print(output)


def info(arguments: argparse.Namespace) -> None:
    """What a model is: shapes, size, scaling, and what it is made for."""
    vae = load_model(arguments.model, "cpu", None)
    if arguments.json:
        print(json.dumps(_facts(arguments.model, vae), indent=1))
        return
    c, f = vae.config, vae.downsampling
    side = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
    fewer = c.in_channels * f**2 / c.latent_channels
    convs = [name for name in ("quant_conv", "post_quant_conv") if getattr(c, f"use_{name}")]
    readers = scaling.pipelines_of(c)
    types = sorted({str(p.dtype).removeprefix("torch.") for p in vae.parameters()})
    megabytes = sum(p.nbytes for p in vae.parameters()) / 1e6
    rows = {
        "model": arguments.model,
        "family": family_of(c),
        "made for": f"{side}x{side} images",
        "images": f"(B, {c.in_channels}, H, W) in [-1, 1], H and W multiples of {f}",
        "latents": f"(B, {c.latent_channels}, H/{f}, W/{f}), {fewer:g} times fewer values",
        "network": f"widths {', '.join(map(str, c.block_out_channels))}; {c.layers_per_block} layers a block; "
        f"{c.norm_num_groups} groups; {'attention' if c.mid_block_add_attention else 'no attention'}; "
        f"{' and '.join(convs) or 'no quant_conv'}",
        "parameters": f"{_size(vae):,} (encoder {_size(vae.encoder):,}, decoder {_size(vae.decoder):,})",
        "tensors": f"{' and '.join(types)}, {megabytes:.1f} MB",
        "scaling": scaling.described(c),
        "read by": f"{' and '.join(readers) or 'none of the'} pipelines of diffusers",
        "force_upcast": "yes, pipelines decode in float32" if c.force_upcast else "no, made for float16 too",
    }
    for key, value in rows.items():
        print(f"{key:14}{value}")


def _facts(name: str, vae: KLAutoencoder) -> dict:
    """What `info --json` prints: keys of the config under its names, counts as numbers."""
    keys = (
        "sample_size in_channels out_channels latent_channels block_out_channels layers_per_block norm_num_groups "
        "mid_block_add_attention use_quant_conv use_post_quant_conv force_upcast"
    )
    return {
        "model": name,
        "family": family_of(vae.config),
        "downsampling": vae.downsampling,
        "parameters": {"all": _size(vae), "encoder": _size(vae.encoder), "decoder": _size(vae.decoder)},
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in vae.parameters()}),
        "bytes": sum(p.nbytes for p in vae.parameters()),
        "scaling": {key: vae.config.get(key) for key in scaling.SCALING_KEYS},
        "pipelines": list(scaling.pipelines_of(vae.config)),
        "config": {key: vae.config.get(key) for key in keys.split()},
    }


def fp16_check(arguments: argparse.Namespace) -> int:
    """Whether a model overflows in float16, by layer; with --fix the same model that does not. 1 if unsafe."""
    photographs, folder, output = arguments.images, arguments.folder, arguments.output
    vae = load_model(arguments.model, arguments.device, "float32")
    noise = float16_check.noise_latents(vae, arguments.size)
    before = float16.measure(vae, _probes(photographs, arguments.size), [noise])
    if arguments.fix:
        fixed = _fix(vae, before, _probes(photographs, arguments.size), noise)
        output.parent.mkdir(parents=True, exist_ok=True)
        _export_folder(fixed, output, model_card=folder / "README.md" if folder else None)
        print(output)
        return 0
    if arguments.json:
        found = {"safe": not before.unsafe(), "limit": float16.LIMIT, "unsafe": before.unsafe()}
        print(json.dumps({"model": arguments.model, **found, "largest": before.by_layer()}, indent=1))
        return int(bool(before.unsafe()))
    print(float16_check.layers_table({"largest": before}))
    print(float16_check.verdict(before))
    if before.unsafe():
        print("--fix -o FOLDER writes the same model, rescaled to be safe")
    elif vae.config.force_upcast:
        print("force_upcast in its config is not needed; --fix -o FOLDER writes it without")
    return int(bool(before.unsafe()))


def _fix(
    vae: KLAutoencoder, before: float16.Activations, probes: Iterator[Tensor], noise: Tensor
) -> KLAutoencoder:
    """The model rescaled for float16, and a report of what that changes; ValueError if it is not fit to be kept."""
    fixed = float16.rescaled(vae, before)
    others = {
        "fixed": fixed,
        "before": float16_check.in_float16(vae),
        "after": float16_check.in_float16(fixed),
    }
    with float16.recording(fixed) as after:
        compared = float16_check.compare(vae, others, probes, [noise])
    same = max(difference.relative for difference in compared["fixed"])
    eps = float16.norm_change(before, after)
    print(float16_check.layers_table({"before": before, "after": after}))
    print(f"before: {float16_check.verdict(before)}")
    print(f"after:  {float16_check.verdict(after)}")
    print(f"float32: before and after differ by {same:.2g} of the range at most, norms, by eps, by {eps:.2g}")
    for name in ("before", "after"):
        latents, images = compared[name]
        print(f"float16: {name} against float32: latents {latents}, images {images}")
    if after.unsafe():
        stuck = ", ".join(after.unsafe()[:4])
        raise ValueError(f"rescaling cannot bring into range: {stuck}; nothing is written")
    if same > SAME_FUNCTION or not all(math.isfinite(difference.largest) for difference in compared["after"]):
        raise ValueError("the rescaled model is not the same; nothing is written")
    return fixed


def _probes(photographs: list[tuple[Path, str]], size: int) -> Iterator[Tensor]:
    """Images to measure on: hard ones, and `photographs` or, if there are none, those of scikit-image.

    A photograph that cannot be read is told, skipped and taken from the list.
    """
    built_in = [
        *float16_check.hard_images(size),
        *([] if photographs else float16_check.sample_photographs(size)),
    ]
    yield from tracked(built_in, "measuring hard images" if photographs else "measuring", "images")
    if not photographs:
        return
    unread = []
    yield from (images for _, images in _read(photographs, size, unread, "measuring"))
    if len(unread) == len(photographs):
        raise ValueError("none of the photographs could be read")
    photographs[:] = [photograph for photograph in photographs if photograph[0] not in unread]


def _export_folder(vae: KLAutoencoder, output: Path, model_card: Path | None) -> None:
    """Written beside `output` and then renamed; what else an existing folder holds stays."""
    temporary = temporary_beside(output)
    try:
        vae.save_pretrained(temporary)
        if model_card and model_card.is_file():
            shutil.copyfile(model_card, temporary / "README.md")
        if output.is_dir():
            for file in temporary.iterdir():
                os.replace(file, output / file.name)
        else:
            os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(
    photographs: Sequence[tuple[Path, str]],
    size: int | None,
    unread: list[Path],
    what: str,
    vae: KLAutoencoder | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(index, images (1, 3, H, W)); of several photographs, one that cannot be read is told and skipped.

    One that does not fit into memory with `vae`, which is tiled where that helps, counts as one of these.
    """
    for i, (path, _) in enumerate(tracked(photographs, what, "images")):
        try:
            if vae is not None:
                _prepare(vae, path, (size, size) if size else image_size(path))
            images = load_image(path, size, multiple_of=1)
        except (ValueError, OSError) as error:
            if len(photographs) == 1:
                raise
            say("skipped", error)
            unread.append(path)
        else:
            yield i, images


def _prepare(vae: KLAutoencoder, path: Path | str, size: tuple[int, int]) -> None:
    try:
        prepare_for(vae, *size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse_unread(unread: Sequence[Path], photographs: Sequence) -> None:
    if unread:
        raise ValueError(f"{len(unread)} of {len(photographs)} photographs could not be read")


def _padded(images: Tensor, vae: KLAutoencoder) -> Tensor:
    return pad_to_multiple(images, vae.downsampling).to(vae.device, vae.dtype)


def _write(images, path: Path, name: str, size: tuple[int, int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, size)
    write(f"{name} -> {path}")


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
