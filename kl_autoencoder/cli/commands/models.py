"""export, push, info: a model written for use elsewhere, also by other runtimes and on the hub; what a model is."""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...console import say
from ...extras import require
from ...files import temporary_beside
from ...models.folder import HUB_ID
from ...progress import Progress
from ..parser import MODEL, Command, Parser, add_dtype, add_json, add_output
from ..paths import check_model, model_path, readable_folder, refuse_existing
from . import codec

if TYPE_CHECKING:
    from torch import nn

    from ...models.autoencoder_kl import KLAutoencoder

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")  # an identifier, as the hub has them
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


def export_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL)
    parser.add_argument("--single-file", action="store_true", help="one .safetensors in LDM layout")
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="vae_encoder/model.onnx and vae_decoder/model.onnx, as optimum reads them; any size and batch; with "
        "--dtype float16 the weights are rescaled, exactly, where float16 would overflow",
    )
    add_dtype(parser, None, "store in this type (default: as it is; with --onnx float32)")
    add_output(parser, "OUT", "a folder for diffusers, or with --single-file a .safetensors file")


def check_export(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path; adds `folder`, the model's, or None for a single file or a hub id."""
    check_model(arguments.model)
    source, output = model_path(arguments.model), Path(arguments.output)
    arguments.output, arguments.folder = output, readable_folder(source) if source.is_dir() else None
    if arguments.onnx:
        check_onnx(arguments)
    elif arguments.single_file:
        if output.suffix != ".safetensors":
            raise ValueError(f"{output}: a single file is written to a .safetensors file")
        inputs = arguments.folder.iterdir() if arguments.folder else [source]
        refuse_existing([output], list(inputs), arguments.overwrite)
    elif output.is_file():
        raise ValueError(f"{output}: is a file; without --single-file a folder is written")
    else:
        check_model_output(output, arguments.folder, arguments.overwrite)


def check_onnx(arguments: argparse.Namespace) -> None:
    if arguments.single_file:
        raise ValueError("--onnx and --single-file: one of them; --onnx writes a folder")
    if arguments.dtype == "bfloat16":
        raise ValueError("--dtype: 'bfloat16'; allowed with --onnx: float32, float16")
    output = arguments.output
    if output.is_file():
        raise ValueError(f"{output}: is a file; with --onnx a folder is written")
    there = [path for path in (output / "vae_encoder", output / "vae_decoder") if path.exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{there[0]}: exists already; --overwrite replaces it")
    refuse_existing([output / "config.json"], [], overwrite=True)
    require("onnx", "onnx", "onnxscript")
    if arguments.dtype == "float16":
        require("eval", "skimage")  # whose photographs the activations are measured on


def check_model_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Refuse to write a model folder where a file or the model itself is, or other things are."""
    if output.is_file():
        raise ValueError(f"{output}: is a file, not a folder")
    if model and output.is_dir() and output.samefile(model):
        raise ValueError(f"{output}: is the model itself")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output}: exists already and is not empty; --overwrite replaces the model in it")
    refuse_existing([output / "config.json"], [], overwrite=True)


def export(arguments: argparse.Namespace) -> None:
    """Write a training run's or any other model as a diffusers folder, or as a single file in LDM layout."""
    from ..loading import load_model

    output, folder = arguments.output, arguments.folder
    if arguments.onnx:
        export_to_onnx(arguments.model, output, arguments.dtype)
        return
    vae = load_model(arguments.model, "cpu", arguments.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.single_file:
        vae.save_single_file(output)
    else:
        write_model_folder(vae, output, card_of(folder))
    print(output)


def export_to_onnx(model: str, output: Path, dtype: str | None) -> None:
    """Write both graphs beside `output`, compare them with torch if onnxruntime is there, and move them into it."""
    from ...models.publishing import onnx_export
    from ..loading import load_model

    vae = load_model(model, "cpu", "float32")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(output)
    try:
        with Progress("exporting to ONNX"):
            vae = onnx_export.safe_in_float16(vae) if dtype == "float16" else vae
            onnx_export.export_onnx(vae, temporary)
        if onnx_export.can_be_checked():
            with Progress("checking in onnxruntime"):
                found = onnx_export.differences(vae, temporary)
            print(onnx_export.described(found))
        else:
            say("warning", "onnxruntime is not installed: not checked against torch (kl-autoencoder[onnx])")
        _replace_folders(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(output)


def _replace_folders(new: Path, output: Path) -> None:
    """Move each folder in `new` into `output`, in place of one of that name; what else is there stays."""
    output.mkdir(exist_ok=True)
    for folder in list(new.iterdir()):
        old = new / f"old-{folder.name}"
        if (output / folder.name).exists():
            os.replace(output / folder.name, old)
        os.replace(folder, output / folder.name)


def card_of(folder: Path | None) -> dict[str, Path]:
    """The model card in a model's folder, if there is one, as a file to write beside a copy of the model."""
    card = folder / "README.md" if folder else None
    return {"README.md": card} if card and card.is_file() else {}


def write_model_folder(vae: "KLAutoencoder", output: Path, others: Mapping[str, Path]) -> None:
    """Save a model beside `output` and rename it then; what else an existing folder holds stays.

    others: files that are copied into it, by the names that they get there.
    """
    temporary = temporary_beside(output)
    try:
        vae.save_pretrained(temporary)
        for name, file in others.items():
            shutil.copyfile(file, temporary / name)
        if output.is_dir():
            for file in temporary.iterdir():
                os.replace(file, output / file.name)
        else:
            os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """`output` becomes a Path or None; adds `run`, the folder of a training run, or None."""
    if not HUB_ID.fullmatch(arguments.to):
        raise ValueError(f"--to: {arguments.to!r}; allowed: owner/name")
    if arguments.license is not None and not LICENSE.fullmatch(arguments.license):
        raise ValueError(f"--license: {arguments.license!r}; allowed: an identifier, such as apache-2.0")
    if arguments.dry_run != bool(arguments.output):
        raise ValueError("--dry-run and -o FOLDER belong together")
    check_model(arguments.model)
    source = model_path(arguments.model)
    folder = readable_folder(source) if source.is_dir() else None
    arguments.run = source if (source / "config.yaml").is_file() else None
    if arguments.dry_run:
        arguments.output = Path(arguments.output)
        check_model_output(arguments.output, folder, arguments.overwrite)


def push(arguments: argparse.Namespace) -> None:
    """Write weights, config, card and picture to a folder, and commit it to the hub unless it is a dry run."""
    from ...models.publishing.hub import publish
    from ..loading import load_model

    vae = load_model(arguments.model, "cpu", arguments.dtype)
    if arguments.dry_run:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_repository(vae, arguments.output, arguments.to, arguments.license, arguments.run)
        print(arguments.output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_repository(vae, folder, arguments.to, arguments.license, arguments.run)
        with Progress(f"pushing to {arguments.to}"):
            print(publish(folder, arguments.to, arguments.private))


def write_repository(
    vae: "KLAutoencoder", output: Path, repo: str, license: str | None, run: Path | None
) -> None:
    """What the repository is to hold: config, .safetensors files, README.md and, of a run, its last picture."""
    from ...models.publishing.hub_card import PICTURE, model_card, newest_picture

    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / "README.md"
        card.write_text(model_card(vae, repo, license, run), encoding="utf-8")
        others = {"README.md": card}
        if picture := run and newest_picture(run):
            others[PICTURE] = picture
        write_model_folder(vae, output, others)


def info_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL}; or a file that compress wrote")
    add_json(parser)


def check_info(arguments: argparse.Namespace) -> None:
    if codec.is_compressed(arguments.model):
        codec.read_header(Path(arguments.model))
    else:
        check_model(arguments.model)


def info(arguments: argparse.Namespace) -> None:
    """Print what a model is: shapes, size, scaling, what it is made for; or the header of a compressed file."""
    from ..loading import load_model

    if codec.is_compressed(arguments.model):
        codec.print_header(arguments.model, arguments.json)
        return
    vae = load_model(arguments.model, "cpu", None)
    if arguments.json:
        print(json.dumps(_facts(arguments.model, vae), indent=1))
        return
    for key, value in _described(arguments.model, vae).items():
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
    """What `info --json` prints: keys of the config under its names, counts as numbers."""
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
    "export": Command("write a trained model for use elsewhere", export_arguments, check_export, export),
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
