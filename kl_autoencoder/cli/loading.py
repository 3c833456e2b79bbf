"""Load the model of `--model`, read the photographs that a command is given, and write its pictures."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ..console import say
from ..data.image_io import image_size, load_image, pad_to_multiple, save_image
from ..files import clipped, one_line
from ..models.autoencoder_kl import ExactAutoencoder
from ..models.classes import class_of, class_of_file, hub_config
from ..models.folder import CONFIG, WEIGHTS, read_headers, read_json
from ..models.large_images import prepare_for
from ..models.publishing import hub
from ..models.run_folder import described, newer_checkpoint, weights_in
from ..progress import Progress, tracked, write
from .paths import MODELS, OTHERS, check_model, model_folder, model_path


def load_model(name: str, device: str | None, dtype: str | None) -> ExactAutoencoder:
    """Load a model for inference; `name` is a folder, a run, a single file, a hub id or a packaged model.

    If the export of a run is missing or older than its newest checkpoint, that checkpoint is loaded and a line on
    stderr says so. `device` None chooses the best available, `dtype` None keeps the type of the stored tensors.
    Raises ValueError or FileNotFoundError, which name the model, if it cannot be loaded.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with Progress(f"loading {name}"):
        with _quiet_diffusers():
            vae = _load(name)
        return move_model(vae, device, dtype).eval().requires_grad_(False)


def other_kind(name: str) -> str | None:
    """The class, one of `paths.OTHERS`, of the autoencoder in a folder or hub id; None for any other."""
    path = model_path(name)
    if path.is_file() or newer_checkpoint(path):
        return None
    try:
        config = (
            read_json(model_folder(path, (*MODELS, *OTHERS)) / CONFIG) if path.is_dir() else hub_config(name)
        )
    except OSError:
        return None
    kind = config.get("_class_name")
    return kind if kind in OTHERS else None


def load_other_model(name: str, kind: str, device: str, dtype: str | None) -> Any:
    """Load another autoencoder of diffusers for inference, from a folder or hub id; `kind` is its class."""
    from ..evaluation.other_autoencoders import load_other

    path = model_path(name)
    folder = model_folder(path, OTHERS) if path.is_dir() else name
    with Progress(f"loading {name}"), _quiet_diffusers():
        return move_model(load_other(folder, kind), device, dtype).eval().requires_grad_(False)


def move_model(vae: ExactAutoencoder, device: str, dtype: str | None) -> ExactAutoencoder:
    """Move a model to `device` and to the type `dtype` (None: unchanged)."""
    with _quiet_diffusers():
        return vae.to(device=torch.device(device), dtype=getattr(torch, dtype) if dtype else None)


def _load(name: str) -> ExactAutoencoder:
    check_model(name)
    path = model_path(name)
    if path.is_dir():
        if checkpoint := newer_checkpoint(path):
            return _load_checkpoint(path, checkpoint)
        folder = model_folder(path)
        return class_of(folder).from_pretrained(folder, torch_dtype=_stored_dtype(folder))
    if path.is_file():
        return class_of_file(path).from_single_file(path)
    return _load_from_hub(name)


def _load_from_hub(name: str) -> ExactAutoencoder:
    """Load from a VAE's repository or a pipeline's vae/; from the local cache if the hub cannot be reached."""
    reached = hub.is_reachable(name)
    options = {} if reached else {"local_files_only": True}
    for subfolder in ("", "vae"):
        try:
            where = {"subfolder": subfolder} if subfolder else {}
            return class_of(name, subfolder, **options).from_pretrained(name, **where, **options)
        except OSError as error:
            problem = error
    if not reached:
        raise FileNotFoundError(hub.unreachable(name)) from problem
    answer = hub.refusal_in(problem)
    if isinstance(answer, hub.GatedRepoError):
        raise ValueError(hub.refusal(name, answer)) from problem
    said = clipped(one_line(str(problem)), 120)
    raise FileNotFoundError(f"{name}: no autoencoder with .safetensors weights in it ({said})") from problem


def _load_checkpoint(folder: Path, checkpoint: Path) -> ExactAutoencoder:
    """Load the weights that a run would export now, and print on stderr which they are."""
    config = {key: v for key, v in read_json(checkpoint / CONFIG).items() if not key.startswith("_")}
    vae = class_of(checkpoint).from_single_file(weights_in(checkpoint), **config)
    print(described(folder, checkpoint), file=sys.stderr)
    return vae


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type of the tensors in a model folder, float32 for types of one byte.

    It must be passed to diffusers, which otherwise converts to float32.
    """
    tensors = read_headers(folder)
    if not tensors:
        raise FileNotFoundError(f"{folder}: no .safetensors file in it that is called {WEIGHTS}")
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.dtype != torch.int64)
    return dtype if dtype.itemsize > 1 else torch.float32


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' log, which warns of precision at every `.to` and logs errors before it raises them."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def read_photographs(
    photographs: Sequence[tuple[Path, str]],
    size: int | None,
    unread: list[Path],
    what: str,
    vae: ExactAutoencoder | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, images (1, C, H, W) in [-1, 1]) of each photograph, in RGB or in the channels of `vae`.

    photographs: (path, name) pairs. size: centre squares of this side, or None for every pixel. what: heading of
    the progress bar. Of several photographs, those that cannot be read are reported, skipped and appended to
    `unread`; a single one raises its error. If `vae` is given, it is tiled for large photographs, and those that do
    not fit into memory even so count as unreadable.
    """
    for i, (path, _) in enumerate(tracked(photographs, what, "images")):
        try:
            if vae is not None:
                prepare_memory(vae, path, (size, size) if size else image_size(path))
            channels = 3 if vae is None else vae.config.in_channels
            images = load_image(path, size, multiple_of=1, channels=channels)
        except (ValueError, OSError) as error:
            if len(photographs) == 1:
                raise
            say("skipped", error)
            unread.append(path)
        else:
            yield i, images


def refuse_unread(unread: Sequence[Path], photographs: Sequence) -> None:
    """Raise ValueError if photographs could not be read; called after the others are done."""
    if unread:
        raise ValueError(f"{len(unread)} of {len(photographs)} photographs could not be read")


def prepare_memory(vae: ExactAutoencoder, path: Path | str, size: tuple[int, int]) -> None:
    """Tile the model for an image of `size` (H, W) if it is large. ValueError, which names `path`, if none fits."""
    try:
        prepare_for(vae, *size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def padded(images: Tensor, vae: ExactAutoencoder) -> Tensor:
    """Pad images (B, C, H, W) to multiples of the model's factor, and move them to its device and type."""
    return pad_to_multiple(images, vae.size_multiple).to(vae.device, vae.dtype)


def write_picture(
    images: Tensor | Image.Image, path: Path, name: str, size: tuple[int, int] | None = None
) -> None:
    """Save an image, cropped to `size` (H, W), making its folder, and print `name -> path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, size)
    write(f"{name} -> {path}")
