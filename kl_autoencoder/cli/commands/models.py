"""push, info: publish a model on the hub; describe a model."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.folder import HUB_ID
from ...progress import Progress
from ..parser import MODEL, Command, Parser, add_dtype, add_json
from ..paths import check_model, model_path, readable_folder
from . import codec
from .export import check_model_output

if TYPE_CHECKING:
    from torch import nn

    from ...models.autoencoder import Autoencoder
    from ...models.autoencoder_kl import KLAutoencoder

# Keys of the model's config that `info --json` prints.
CONFIG_KEYS = (
    "sample_size", "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
    "norm_num_groups", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "force_upcast",
)  # fmt: skip
FLUX2_KEYS = ("decoder_block_out_channels", "patch_size", "batch_norm_eps")
FORCE_UPCAST = {
    True: "yes, pipelines decode in float32",
    False: "no, made for float16 too",
    None: "no such key in this class",
}


def push_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL)
    parser.add_argument(
        "--to", required=True, metavar="OWNER/NAME", help="the repository, made if it is not there"
    )
    parser.add_argument("--license", metavar="ID", help="in the hub's words: mit, apache-2.0, openrail ...")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--dry-run", action="store_true", help="write what would be pushed to -o")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="with --dry-run: the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    add_dtype(parser, None, "store in this type (default: as it is)")


def check_push(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path or None; adds `run`, a training run's folder, and `folder`, the model's, or None."""
    from ...models.publishing.hub_card import LICENSE

    if not HUB_ID.fullmatch(arguments.to):
        raise ValueError(f"--to: {arguments.to!r}; allowed: owner/name")
    if arguments.license is not None and not LICENSE.fullmatch(arguments.license):
        raise ValueError(f"--license: {arguments.license!r}; allowed: an identifier, such as apache-2.0")
    if arguments.dry_run != bool(arguments.output):
        raise ValueError("--dry-run and -o FOLDER belong together")
    check_model(arguments.model)
    source = model_path(arguments.model)
    arguments.folder = readable_folder(source) if source.is_dir() else None
    arguments.run = source if (source / "config.yaml").is_file() else None
    if arguments.dry_run:
        arguments.output = Path(arguments.output)
        check_model_output(arguments.output, arguments.folder, arguments.overwrite)


def push(arguments: argparse.Namespace) -> None:
    """Write weights, config, entropy model, card and picture to a folder, and unless `--dry-run` to the hub."""
    from ...models.publishing.hub import publish
    from ...models.publishing.repository import write_repository
    from ..loading import load_model

    vae = load_model(arguments.model, "cpu", arguments.dtype)
    described = (arguments.to, arguments.license, arguments.run, arguments.folder)
    if arguments.dry_run:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_repository(vae, arguments.output, *described)
        print(arguments.output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(vae, folder, *described)
        with Progress(f"pushing to {arguments.to}"):
            print(publish(folder, arguments.to, arguments.private))


def info_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}; or a file that compress wrote")
    add_json(parser)


def check_info(arguments: argparse.Namespace) -> None:
    if codec.is_compressed(arguments.model):
        codec.read_header(Path(arguments.model))
    else:
        check_model(arguments.model)


def info(arguments: argparse.Namespace) -> None:
    """Print a model's shapes, size, scaling and purpose, or the header of a compressed file."""
    from ..loading import load_model

    if codec.is_compressed(arguments.model):
        codec.print_header(arguments.model, arguments.json)
        return
    vae = load_model(arguments.model, "cpu", None)
    relative = vae.config.get("bottleneck") is not None
    if arguments.json:
        facts = _facts_of_relative if relative else _facts
        print(json.dumps(facts(arguments.model, vae), indent=1))
        return
    for key, value in (_described_relative if relative else _described)(arguments.model, vae).items():
        print(f"{key:14}{value}")


def _described(name: str, vae: "KLAutoencoder") -> dict[str, str]:
    """The lines of `info`: headings and sentences."""
    from ...models import scaling
    from ...models.single_file import family_of

    c, f = vae.config, vae.downsampling
    side = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
    fewer = c.in_channels * f**2 / c.latent_channels
    convs = [name for name in ("quant_conv", "post_quant_conv") if getattr(c, f"use_{name}")]
    megabytes = sum(p.nbytes for p in vae.parameters()) / 1e6
    return {
        "model": name,
        "family": family_of(c),
        "made for": f"{side}x{side} images",
        "images": f"(B, {c.in_channels}, H, W) in [-1, 1], H and W multiples of {f}",
        "latents": f"(B, {c.latent_channels}, H/{f}, W/{f}), {fewer:g} times fewer values",
        "network": f"widths {_widths(c)}; {c.layers_per_block} layers a block; "
        f"{c.norm_num_groups} groups; {'attention' if c.mid_block_add_attention else 'no attention'}; "
        f"{' and '.join(convs) or 'no quant_conv'}",
        "parameters": f"{_size(vae):,} (encoder {_size(vae.encoder):,}, decoder {_size(vae.decoder):,})",
        "tensors": f"{' and '.join(_dtypes(vae))}, {megabytes:.1f} MB",
        "scaling": scaling.described(vae.scaling),
        "read by": f"{' and '.join(scaling.pipelines_of(vae.scaling)) or 'none of the'} pipelines of diffusers",
        "force_upcast": FORCE_UPCAST[c.get("force_upcast")],
    }


def _facts(name: str, vae: "KLAutoencoder") -> dict:
    """The output of `info --json`: values of the config under their keys, and counts as numbers."""
    from ...models import scaling
    from ...models.single_file import family_of

    keys = [*CONFIG_KEYS, *(key for key in FLUX2_KEYS if key in vae.config)]
    return {
        "model": name,
        "family": family_of(vae.config),
        "downsampling": vae.downsampling,
        "parameters": {"all": _size(vae), "encoder": _size(vae.encoder), "decoder": _size(vae.decoder)},
        "dtypes": _dtypes(vae),
        "bytes": sum(p.nbytes for p in vae.parameters()),
        "scaling": vae.scaling,
        "pipelines": list(scaling.pipelines_of(vae.scaling)),
        "config": {key: vae.config.get(key) for key in keys},
    }


def _described_relative(name: str, vae: "Autoencoder") -> dict[str, str]:
    """The lines of `info` for an `Autoencoder` of this package."""
    c, f = vae.config, vae.downsampling
    options = {key: value for key, value in c.bottleneck.items() if key != "kind"}
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    sides = f"{f}, {f}" if vae.is_mlp else "H, W"
    where = "in [-1, 1]" if vae.is_mlp else f"in [-1, 1], H and W multiples of {f}"
    latents = f"(B, {c.latent_channels}, {'1, 1' if vae.is_mlp else f'H/{f}, W/{f}'})"
    lines = {
        "model": name,
        "family": "Autoencoder of this package",
        "made for": f"{c.sample_size}x{c.sample_size} images",
        "images": f"(B, {c.in_channels}, {sides}) {where}",
        "latents": f"{latents}, {vae.codes} codes" if vae.is_discrete else latents,
        "bottleneck": f"{c.bottleneck['kind']}" + (f" ({said})" if said else ""),
        "classes": str(c.classes or "none"),
        "network": f"fully connected, hidden layers {_listed(c.hidden_sizes)}"
        if vae.is_mlp
        else f"widths {_widths(c)}; {c.layers_per_block} layers a block; {c.norm_num_groups} groups",
        "parameters": f"{_size(vae):,} (encoder {_size(vae.encoder):,}, decoder {_size(vae.decoder):,})",
        "scaling": f"factor {c.scaling_factor:.6g}",
    }
    return lines


def _facts_of_relative(name: str, vae: "Autoencoder") -> dict:
    """The output of `info --json` for an `Autoencoder` of this package."""
    config = {key: vae.config[key] for key in vae.rules}
    return {
        "model": name,
        "family": "Autoencoder of this package",
        "downsampling": vae.downsampling,
        "parameters": {"all": _size(vae), "encoder": _size(vae.encoder), "decoder": _size(vae.decoder)},
        "dtypes": _dtypes(vae),
        "codes": vae.codes if vae.is_discrete else None,
        "scaling": vae.scaling,
        "config": {**config, "bottleneck": dict(config["bottleneck"])},
    }


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) or "none"


def _widths(config: Mapping[str, Any]) -> str:
    widths, decoder = (
        ", ".join(map(str, config.get(key) or ()))
        for key in ("block_out_channels", "decoder_block_out_channels")
    )
    return f"{widths}, decoder {decoder}" if decoder else widths


def _size(module: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _dtypes(vae: "KLAutoencoder") -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in vae.parameters()})


COMMANDS = {
    "push": Command(
        "publish a model on the hub, with its card",
        push_arguments,
        check_push,
        push,
        description="Writes config.json, .safetensors files, a model card with the hub's metadata and, of a "
        "training run, its last figures and picture; no path of this machine is in it. Needs a token "
        "(`hf auth login`).",
    ),
    "info": Command(
        "what a model is: shapes, parameters, scaling, what it is made for", info_arguments, check_info, info
    ),
}
