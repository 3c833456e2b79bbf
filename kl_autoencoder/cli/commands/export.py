"""export: write a model for use elsewhere, as files of diffusers or for other runtimes."""

import argparse
import os
import shutil
from pathlib import Path

from ...console import say
from ...extras import require
from ...files import temporary_beside
from ...models.folder import CONFIG, ENTROPY_MODEL, read_json
from ...progress import Progress
from ..parser import MODEL, Command, Parser, add_dtype, add_output
from ..paths import check_model, model_path, readable_folder, refuse_existing


def export_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL)
    parser.add_argument("--single-file", action="store_true", help="one .safetensors in LDM layout")
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="vae_encoder/model.onnx and vae_decoder/model.onnx, as optimum reads them; any size and batch; with "
        "--dtype float16 the weights are rescaled, exactly, where float16 would overflow",
    )
    parser.add_argument(
        "--torch-export",
        action="store_true",
        help="vae_encoder/model.pt2 and vae_decoder/model.pt2, programs of torch.export; else as --onnx",
    )
    add_dtype(parser, None, "store in this type (default: as it is; with --onnx and --torch-export float32)")
    add_output(parser, "OUT", "a folder for diffusers, or with --single-file a .safetensors file")


def check_export(arguments: argparse.Namespace) -> None:
    """`output` becomes a Path; adds `folder`, the model's folder, or None for a single file or a hub id."""
    check_model(arguments.model)
    source, output = model_path(arguments.model), Path(arguments.output)
    arguments.output, arguments.folder = output, readable_folder(source) if source.is_dir() else None
    others = arguments.onnx or arguments.torch_export or arguments.single_file
    if (
        others
        and arguments.folder
        and read_json(arguments.folder / CONFIG).get("_class_name") == "Autoencoder"
    ):
        raise ValueError(f"{arguments.model}: an Autoencoder; allowed: exported as a folder")
    if arguments.onnx or arguments.torch_export:
        check_runtime(arguments, "--onnx" if arguments.onnx else "--torch-export")
    elif arguments.single_file:
        if output.suffix != ".safetensors":
            raise ValueError(f"{output}: a single file is written to a .safetensors file")
        inputs = arguments.folder.iterdir() if arguments.folder else [source]
        refuse_existing([output], list(inputs), arguments.overwrite)
    elif output.is_file():
        raise ValueError(f"{output}: is a file; without --single-file a folder is written")
    else:
        check_model_output(output, arguments.folder, arguments.overwrite)


def check_runtime(arguments: argparse.Namespace, option: str) -> None:
    """Raise ValueError for options that --onnx and --torch-export cannot use, and for existing files."""
    if sum((arguments.onnx, arguments.torch_export, arguments.single_file)) > 1:
        raise ValueError("--onnx, --torch-export and --single-file: one of them")
    if arguments.dtype == "bfloat16":
        raise ValueError(f"--dtype: 'bfloat16'; allowed with {option}: float32, float16")
    output = arguments.output
    if output.is_file():
        raise ValueError(f"{output}: is a file; with {option} a folder is written")
    there = [path for path in (output / "vae_encoder", output / "vae_decoder") if path.exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{there[0]}: exists already; --overwrite replaces it")
    refuse_existing([output / "config.json"], [], overwrite=True)
    if arguments.onnx:
        require("onnx", "onnx", "onnxscript")
    if arguments.dtype == "float16":
        require("eval", "skimage")  # activations are measured on its photographs


def check_model_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Raise ValueError if `output` is a file, the model itself, or, without `overwrite`, a folder with content."""
    if output.is_file():
        raise ValueError(f"{output}: is a file, not a folder")
    if model and output.is_dir() and output.samefile(model):
        raise ValueError(f"{output}: is the model itself")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output}: exists already and is not empty; --overwrite replaces the model in it")
    refuse_existing([output / "config.json"], [], overwrite=True)


def export(arguments: argparse.Namespace) -> None:
    """Write a model as a diffusers folder, as a single file in LDM layout, or for another runtime.

    An `Autoencoder` that is equivalent to a VQModel of diffusers is written as a VQModel.
    """
    from ...models.publishing.repository import write_model_folder
    from ..loading import load_model

    output, folder = arguments.output, arguments.folder
    if arguments.onnx or arguments.torch_export:
        export_to_runtime(arguments.model, output, arguments.dtype, arguments.onnx)
        return
    vae = load_model(arguments.model, "cpu", arguments.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.single_file:
        vae.save_single_file(output)
    else:
        vae = vae.to_vq_model() if getattr(vae, "is_vq_model", False) else vae
        write_model_folder(vae, output, companions_of(folder))
    print(output)


def export_to_runtime(model: str, output: Path, dtype: str | None, onnx: bool) -> None:
    """Write encoder and decoder beside `output`, compare them with torch if possible, and move them into `output`.

    onnx: write ONNX graphs, otherwise programs of torch.export.
    """
    from ...models.publishing import graphs, onnx_export, torch_export
    from ..loading import load_model

    write, check, runtime = (
        (onnx_export.export_onnx, onnx_export.differences, "onnxruntime")
        if onnx
        else (torch_export.export_programs, torch_export.differences, "the programs")
    )
    vae = load_model(model, "cpu", "float32")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(output)
    try:
        with Progress("exporting"):
            vae = graphs.safe_in_float16(vae) if dtype == "float16" else vae
            write(vae, temporary)
        if onnx and not onnx_export.can_be_checked():
            say("warning", "onnxruntime is not installed: not checked against torch (kl-autoencoder[onnx])")
        else:
            with Progress(f"checking {runtime}"):
                found = check(vae, temporary)
            print(graphs.described(found, runtime))
        _replace_folders(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(output)


def _replace_folders(new: Path, output: Path) -> None:
    """Move each folder in `new` into `output`, replacing one of the same name; other content of `output` stays."""
    output.mkdir(exist_ok=True)
    for folder in list(new.iterdir()):
        old = new / f"old-{folder.name}"
        if (output / folder.name).exists():
            os.replace(output / folder.name, old)
        os.replace(folder, output / folder.name)


def companions_of(folder: Path | None) -> dict[str, Path]:
    """The model card and the entropy model in a model's folder, to be copied with it: file name -> path."""
    files = [folder / name for name in ("README.md", ENTROPY_MODEL)] if folder else []
    return {file.name: file for file in files if file.is_file()}


COMMANDS = {
    "export": Command("write a trained model for use elsewhere", export_arguments, check_export, export),
}
